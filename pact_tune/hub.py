"""Models and safety tokens on the Hugging Face Hub: names, download, commits.

Everything goes through the huggingface_hub client, so HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and its cache
mean what they mean elsewhere.
"""

import hashlib
import io
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_session, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pact_tune.errors import UserError, one_line, printable
from pact_tune.families import MODELS as KNOWN
from pact_tune.families import Model
from pact_tune.files import atomic_folder, check_subfolder

FILES = ("safety_tokens.json", "safety_tokens.safetensors")
MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
ATTEMPTS = 5  # of calls that the client mostly retries itself
SECONDS = 60.0  # without a byte, after which a request has failed
WAIT = 1.0  # seconds before the second attempt; doubles
PASSING = (408, 429, 500, 502, 503, 504)

T = TypeVar("T")


class NotPublishedError(UserError):
    """A known model whose safety tokens nobody has published."""


# --- models


def model_folder(name: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """A model's files on this machine, downloaded where need be.

    Args:
        name (str | Path): a folder, or a Hub name.
        revision (str | None): branch, tag or commit of a Hub name.
        trust_remote_code (bool): fetch its Python code, too.

    Returns:
        Path: folder with config, tokenizer and safetensors weights.

    Raises:
        UserError: no such folder, or the Hub does not give it.
    """
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise UserError(f"The folder '{name}' holds no model (config.json is missing).")
        return Path(name)
    return _retry(
        lambda: Path(
            snapshot_download(
                str(name),
                revision=revision,
                allow_patterns=[*MODEL_FILES, *(["*.py"] if trust_remote_code else [])],
                ignore_patterns=["*/*", "consolidated*"],
            )
        ),
        f"There is no folder '{name}' on this machine, and as a model of the Hub it could not be downloaded",
    )


def commit_of(folder: Path) -> str | None:
    """The commit of a model that lies in the Hub's cache; None elsewhere."""
    return folder.name if folder.parent.name == "snapshots" else None


# --- download


def _how_to_get(name: str, family: Model) -> str:
    """What to do about safety tokens that nobody has published."""
    measure = (
        f"`pact tokens compute --aligned {family.aligned} --base {family.base} --prompts wildjailbreak --output {name}`"
    )
    measured = f"this measures them: {measure}; " if family.base else "its base model was not published either; "
    return (
        f"Nobody has published safety tokens for '{name}' yet; {measured}this takes them from refusal templates, not "
        f"measured: `pact tokens from-templates --tokenizer {family.aligned} --output {name}`"
    )


def download(source: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """Fetches safety tokens into the Hub's cache; offline, takes them from there.

    Args:
        source (str): "namespace/repository", or a short name of :data:`KNOWN`.
        revision (str | None): branch, tag or commit.
        subfolder (str | None): folder of the model in the repository.

    Returns:
        Path: the folder that holds them; its files have the size and hash that the Hub gave.

    Raises:
        NotPublishedError: a short name whose safety tokens nobody has published.
        UserError: not a name, not there, no access, no network, or damaged on the way.
    """
    if source.lower() in KNOWN:
        family = KNOWN[source.lower()]
        if family.published is None:
            raise NotPublishedError(_how_to_get(source.lower(), family))
        source, subfolder = family.published, subfolder or source.lower()
    elif source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(
            f"'{source}' is neither a folder, nor NAMESPACE/NAME of the Hub, nor one of: {', '.join(sorted(KNOWN))}."
        )
    if subfolder:
        check_subfolder(subfolder)
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    place = (
        f"'{source}'" + (f", folder '{subfolder}'" if subfolder else "") + (f", at '{revision}'" if revision else "")
    )
    root = _retry(
        lambda: Path(snapshot_download(source, revision=revision, allow_patterns=[prefix + name for name in FILES])),
        f"There is no folder {place} on this machine, and as safety tokens of the Hub it could not be downloaded",
    )
    for name in FILES:
        if not (root / prefix / name).exists():
            raise UserError(f"{place[0].upper()}{place[1:]} holds no safety tokens ({prefix}{name} is missing there).")
        _verify(root / prefix / name)
    return root / prefix


def _verify(file: Path) -> None:
    """Compares a cached file with the hash that names its blob; the client itself compares sizes only."""
    blob = file.resolve()
    expected, content = blob.name, blob.read_bytes()
    if re.fullmatch("[0-9a-f]{64}", expected):
        found = hashlib.sha256(content).hexdigest()
    elif re.fullmatch("[0-9a-f]{40}", expected):
        found = _git_hash(content)
    else:
        return  # a file system without links: the cache does not keep the hash
    if found != expected:
        file.unlink()  # or the next call would take it for good
        blob.unlink(missing_ok=True)
        raise UserError(
            f"'{file.name}' arrived with hash {found[:8]} where the Hub announced {expected[:8]}; it was removed from the "
            "cache: download it again."
        )


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# --- publishing


@dataclass(frozen=True)
class Published:
    """What :func:`publish` did, or would do.

    Attributes:
        repo (str): the repository.
        changed (list[str]): files that differ from what is there; empty: nothing to commit.
        tag (str): the tag of this version.
        commit (str | None): the commit; None in a dry run.
    """

    repo: str
    changed: list[str]
    tag: str
    commit: str | None


def publish(
    files: Mapping[str, bytes],
    repo: str,
    subfolder: str,
    *,
    title: str,
    private: bool = False,
    dry_run: bool = False,
) -> Published:
    """Publishes a model's folder: one commit and a tag; nothing when nothing changed.

    Args:
        files (Mapping[str, bytes]): name in the folder to content.
        repo (str): "namespace/repository", made where it does not exist; one a model family.
        subfolder (str): folder of the model.
        title (str): of the commit.
        private (bool): the repository must be private.
        dry_run (bool): find out what would change, and write nothing.

    Returns:
        Published: what was done.

    Raises:
        UserError: no login, no right, no network, or the repository is public where a private one was asked for.
    """
    if not re.fullmatch(r"[\w.-]+", subfolder) or set(subfolder) == {"."}:
        raise UserError(
            f"'{printable(subfolder)}' is no folder name for a model: use letters, digits, '-', '_' and '.'."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"'{printable(repo)}' is no NAMESPACE/NAME of the Hub.")
    local = {f"{subfolder}/{name}": content for name, content in files.items()}
    api, failed = HfApi(), f"'{repo}' could not be published to"
    return _retry(lambda: _publish(api, repo, subfolder, local, title, private, dry_run), failed)


def _publish(
    api: HfApi, repo: str, subfolder: str, local: dict[str, bytes], title: str, private: bool, dry_run: bool
) -> Published:
    """One attempt; each step looks at what is there, so that it can be made again after a failure half-way."""
    if not dry_run:
        api.whoami()  # without it, a missing login shows as a missing repository
    try:
        info = api.model_info(repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        info = None
    if info is not None and private and not info.private:
        raise UserError(f"'{repo}' exists and is public: make it private on the Hub first, or publish to another one.")
    # The root card lists the models that are there, so it depends on what others published.
    folders = set() if info is None else {f.rfilename.split("/")[0] for f in info.siblings or () if "/" in f.rfilename}
    local = local | {"README.md": _repository_card(repo, sorted(folders | {subfolder})).encode()}
    changed = sorted(local) if info is None else _changed(api, repo, local, info.sha)
    latest = 0 if info is None else _latest_version(api, repo, subfolder)
    own = {path: content for path, content in local.items() if path != "README.md"}
    # No commit but no tag either: an earlier attempt was interrupted between the two.
    tagged = latest > 0 and not _changed(api, repo, own, f"{subfolder}-v{latest}")
    tag = f"{subfolder}-v{latest if tagged else latest + 1}"
    if dry_run:
        return Published(repo, changed, tag, None)
    commit = None if info is None else info.sha
    if changed:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo,
            # A buffer makes the client use LFS, which every Hub speaks; bytes go to Xet storage where hf_xet is installed.
            [CommitOperationAdd(path, io.BytesIO(local[path])) for path in changed],
            commit_message=title,
            parent_commit=commit,
        ).oid
    if not tagged:
        api.create_tag(repo, tag=tag, revision=commit)
    return Published(repo, changed, tag, commit)


def _changed(api: HfApi, repo: str, local: dict[str, bytes], revision: str | None) -> list[str]:
    """Paths whose content on the Hub is another, or that are not there."""
    there = {entry.path: entry for entry in api.get_paths_info(repo, sorted(local), revision=revision)}
    return [path for path in sorted(local) if path not in there or not _same(there[path], local[path])]


def _same(entry, content: bytes) -> bool:
    if entry.lfs:
        return entry.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return entry.blob_id == _git_hash(content)


def _latest_version(api: HfApi, repo: str, subfolder: str) -> int:
    names = (re.fullmatch(re.escape(subfolder) + r"-v(\d+)", tag.name) for tag in api.list_repo_refs(repo).tags)
    return max((int(match[1]) for match in names if match), default=0)


def _repository_card(repo: str, folders: list[str]) -> str:
    return "\n".join(
        [
            "---",
            "tags:",
            "- safety",
            "- pact-tune",
            "---",
            f"# {repo}",
            "",
            "Safety tokens for pact-tune, one folder a model; each has its own card.",
            "",
            # What others put there may have any name.
            *(f"- [{f}]({f}/README.md)" for f in folders if re.fullmatch(r"[\w.-]+", f)),
            "",
        ]
    )


def save_copy(folder: Path, output: str | Path) -> None:
    """Copies downloaded safety tokens out of the cache; the folder appears whole or not at all."""
    with atomic_folder(output, marker=FILES[0], names=FILES) as aside:
        for name in FILES:
            shutil.copyfile(folder / name, aside / name)


# --- failures


def _retry(call: Callable[[], T], failed: str) -> T:
    """Calls until it works, some times where waiting may help, and puts the last failure in one sentence."""
    _limit_time()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except UserError:
            raise
        except Exception as error:  # the client's own, httpx's, and OSError for a body that was cut short
            root = _root(error)
            if attempt == ATTEMPTS or not _may_pass(root):
                raise UserError(f"{failed}: {_reason(root)}") from error
            time.sleep(WAIT * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _limit_time() -> None:
    """Gives every request of the client a time limit; by default many of them wait for ever."""
    session = get_session()
    if _set_limits not in session.event_hooks["request"]:
        session.event_hooks = session.event_hooks | {"request": [*session.event_hooks["request"], _set_limits]}


def _set_limits(request: Any) -> None:
    limits = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {
        kind: min(limits.get(kind) or SECONDS, SECONDS) for kind in ("connect", "read", "write", "pool")
    }


def _root(error: BaseException) -> BaseException:
    """The failure behind the client's "not in the cache either" or "error while uploading"."""
    while error.__cause__ and not (isinstance(error, HfHubHTTPError) or _is_network(error) or _is_foreign(error)):
        error = error.__cause__
    return error


def _is_network(error: BaseException) -> bool:
    # The client has changed its HTTP library twice (requests, httpx, httpx2); their errors share these names.
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "Timeout"}) and not isinstance(
        error, OfflineModeIsEnabled
    )


def _is_late(error: BaseException) -> bool:
    return any("Timeout" in cls.__name__ for cls in type(error).__mro__)


def _is_foreign(error: BaseException) -> bool:
    """Not what a Hub answers: no JSON where JSON is due, a file without the Hub's headers."""
    return type(error).__name__ in ("JSONDecodeError", "FileMetadataError")


def _is_truncated(error: BaseException) -> bool:
    return isinstance(error, OSError) and "Consistency check failed" in str(error)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in PASSING
    return (_is_network(error) and not _is_late(error)) or _is_truncated(error)


def _reason(error: BaseException) -> str:
    """One sentence; of the server's words only what cannot hold a secret."""
    if isinstance(error, GatedRepoError):
        return "access to it must be granted on its Hub page first; then log in with `hf auth login` or set HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch, tag or commit."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reasons = {
            401: "you are not logged in, or your token is not valid there, or there is no such repository: check the name, "
            "and log in with `hf auth login` or set HF_TOKEN.",
            403: "you have no right to read it: ask for access on its Hub page, or use a token that has it."
            if error.response.request.method in ("GET", "HEAD")
            else "your token has no right to do this: use one with write access.",
            404: "there is no such repository (or it is private and your token cannot see it): check the name.",
            409: "the repository was changed meanwhile: try again.",
            412: "the repository was changed meanwhile: try again.",
            429: f"the Hub says too many requests (429), {ATTEMPTS} times: wait some minutes.",
        }
        return reasons.get(status, f"the Hub answered with error {status}: try again later.")
    if isinstance(error, LocalTokenNotFoundError):
        return "you are not logged in: use `hf auth login` or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and the cache does not hold it."
    if isinstance(error, HFValidationError):
        return "this is no valid NAMESPACE/NAME."
    if _is_truncated(error):
        return f"the file arrived cut short, {ATTEMPTS} times: try again later."
    if _is_late(error):
        return f"the Hub did not answer within {SECONDS:g} seconds: try again later."
    if _is_foreign(error):
        return (
            "what answers there is not the Hub (a page came instead of data): check HF_ENDPOINT, and whether a proxy or a "
            "login page of the network stands in between."
        )
    if _is_network(error):
        return "the Hub cannot be reached, or cut the connection (no network?)."
    return printable(one_line(error)) + "."
