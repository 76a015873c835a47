"""A small Hub on localhost that the unmodified huggingface_hub client talks to, with faults on demand.

Faults are put into `Hub.faults` as `Fault(method, substring of the path, action, how many times)`.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_a_very_secret_token"


@dataclass
class Fault:
    """What to do to matching requests: a status, "truncate", "corrupt" (a body of the right length), "drop", "html" (a page
    instead of the answer) or "hang" (an answer after seconds)."""

    method: str
    path: str
    action: int | str
    times: int = 1_000_000


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # oid -> path -> content
    log: list[str] = field(default_factory=list)  # oids, oldest first
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)  # uploaded objects

    def add(self, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.log)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.log.append(oid)
        return oid

    def resolve(self, revision: str) -> str | None:
        if revision == "main":
            return self.log[-1]
        return self.tags.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)


def is_lfs(path: str) -> bool:
    return path.endswith(".safetensors")


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Runs a Hub; `Hub.url` is its HF_ENDPOINT."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        self.hub: Hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        url = urlparse(self.path)
        self.route, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, self.route))
        self.damage = None
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and fault.path in self.route:
                fault.times -= 1
                if isinstance(fault.action, int):
                    return self._error(fault.action, "fault")
                if fault.action == "drop":
                    self.close_connection = True
                    return None
                if fault.action == "html":
                    return self._send(
                        200, b"<html><body>Log in to the network</body></html>", {"Content-Type": "text/html"}
                    )
                if fault.action == "hang":
                    threading.Event().wait(3)
                self.damage = fault.action
        for method, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, self.route)
            if match and self.command in method:
                return getattr(self, name)(**match.groupdict())
        return self._error(404, f"no route {self.command} {self.route}")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _any

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    # answers

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.damage == "truncate":
            content, self.close_connection = content[: len(content) // 2], True
        if self.damage == "corrupt":
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.wfile.write(content)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        # The real Hub's error codes are what the client tells its exceptions apart by.
        code = code or {404: "RepoNotFound"}.get(status)
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message} if code else None)

    # access

    def _logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repository(self, repo: str) -> Repository | None:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not self._logged_in()):
            self._error(404 if self._logged_in() else 401, "Repository not found", "RepoNotFound")
            return None
        return found

    def _commit(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        found = self._repository(repo)
        if found is None:
            return None
        oid = found.resolve(revision)
        if oid is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return None
        return found, oid

    def _may_write(self) -> bool:
        if not self._logged_in():
            self._error(401, "Invalid username or password.")
        return self._logged_in()

    # routes

    def whoami(self) -> None:
        if self._may_write():
            self._json({"name": "tester", "type": "user", "orgs": []})

    def create_repo(self) -> None:
        if not self._may_write():
            return
        request = json.loads(self.body)
        name = f"{request.get('organization') or 'tester'}/{request['name']}"
        if name in self.hub.repositories:
            return self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].add({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}"})

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def info(self, repo: str, revision: str = "main") -> None:
        if found := self._commit(repo, revision):
            siblings = [{"rfilename": path} for path in sorted(found[0].commits[found[1]])]
            self._json({"id": repo, "sha": found[1], "private": found[0].private, "siblings": siblings, "tags": []})

    def _entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if is_lfs(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def tree(self, repo: str, revision: str) -> None:
        if found := self._commit(repo, revision):
            self._json([self._entry(p, c) for p, c in sorted(found[0].commits[found[1]].items())])

    def paths_info(self, repo: str, revision: str) -> None:
        if found := self._commit(repo, revision):
            text = self.body.decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            files = found[0].commits[found[1]]
            self._json([self._entry(path, files[path]) for path in wanted if path in files])

    def refs(self, repo: str) -> None:
        if found := self._repository(repo):
            tags = [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": o} for n, o in found.tags.items()]
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": found.log[-1]}
            self._json({"branches": [branch], "converts": [], "tags": tags})

    def tag(self, repo: str, revision: str) -> None:
        if self._may_write() and (found := self._commit(repo, revision)):
            name = json.loads(self.body)["tag"]
            if name in found[0].tags:
                return self._error(409, "Tag reference exists already")
            found[0].tags[name] = found[1]
            self._json({})

    def preupload(self, repo: str, revision: str) -> None:
        if self._may_write() and (found := self._commit(repo, revision)):
            files = found[0].commits[found[1]]
            answers = []
            for file in json.loads(self.body)["files"]:
                answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs(file["path"]) else "regular"}
                if file["path"] in files:
                    content = files[file["path"]]
                    answer["oid"] = hashlib.sha256(content).hexdigest() if is_lfs(file["path"]) else blob_id(content)
                answers.append(answer | {"shouldIgnore": False})
            self._json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        if self._may_write() and (found := self._repository(repo)):
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                answer = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in found.lfs:
                    answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{repo}/{wanted['oid']}", "header": {}}}
                objects.append(answer)
            self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, repo: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the content does not have the announced hash")
        self.hub.repositories[repo].lfs[oid] = self.body
        return self._send(200, b"", {})

    def commit(self, repo: str, revision: str) -> None:
        if not (self._may_write() and (found := self._commit(repo, revision))):
            return None
        repository, parent = found
        files = dict(repository.commits[parent])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit", parent) != parent:
                return self._error(412, "A commit has happened since. Please refresh and try again.")
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if item["key"] == "lfsFile":
                if value["oid"] not in repository.lfs:
                    return self._error(400, "LFS object was not uploaded")
                files[value["path"]] = repository.lfs[value["oid"]]
        oid = repository.add(files)
        return self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not (found := self._commit(repo, revision)):
            return None
        repository, oid = found
        if path not in repository.commits[oid]:
            return self._error(404, "Entry not found", "EntryNotFound")
        content = repository.commits[oid][path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{blob_id(content)}"', "Accept-Ranges": "bytes"}
        if is_lfs(path):
            headers |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
            }
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted:
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return self._send(206, content[start:], headers)
        return self._send(200, content, headers)


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES = (
    (("GET",), "/api/whoami-v2", "whoami"),
    (("POST",), "/api/repos/create", "create_repo"),
    (("POST",), "/api/validate-yaml", "validate_yaml"),
    (("GET",), f"/api/models/{_REPO}", "info"),
    (("GET",), f"/api/models/{_REPO}/revision/{_REVISION}", "info"),
    (("GET",), f"/api/models/{_REPO}/tree/{_REVISION}", "tree"),
    (("POST",), f"/api/models/{_REPO}/paths-info/{_REVISION}", "paths_info"),
    (("GET",), f"/api/models/{_REPO}/refs", "refs"),
    (("POST",), f"/api/models/{_REPO}/tag/{_REVISION}", "tag"),
    (("POST",), f"/api/models/{_REPO}/preupload/{_REVISION}", "preupload"),
    (("POST",), f"/{_REPO}.git/info/lfs/objects/batch", "lfs_batch"),
    (("PUT",), rf"/lfs/{_REPO}/(?P<oid>[0-9a-f]+)", "lfs_upload"),
    (("POST",), f"/api/models/{_REPO}/commit/{_REVISION}", "commit"),
    (("GET", "HEAD"), f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
