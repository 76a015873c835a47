"""Publishing and downloading through the unmodified client, against a Hub on localhost; what happens when it fails."""

import time

import hub_server
import pytest
import torch
from hub_server import Fault
from huggingface_hub import constants

from pact_tune import cli, hub
from pact_tune.errors import UserError
from pact_tune.families import Model
from pact_tune.publishing import model_card, publish
from pact_tune.safety_tokens import SafetyTokens, prebuilt_names

REPO = "tester/family"


def tokens(first: float = 0.5) -> SafetyTokens:
    ids, values = torch.tensor([5, 3]), torch.tensor([first, 0.25])
    candidates = {"ids": ids, "scores": values, "reference_probability": values}
    provenance = {"method": "measured", "tokenizer_fingerprint": "f" * 32, "vocab_size": 9, "aligned_model": "m"}
    return SafetyTokens(ids, values, values, values, candidates, provenance, ["I", " a|b"], ["I", " a|b"])


@pytest.fixture
def server(monkeypatch, tmp_path):
    with hub_server.serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client's waits, and ours
        yield running


@pytest.fixture
def published(server):
    publish(tokens(), REPO, "model-a")
    return server.repositories[REPO]


def load(**where) -> SafetyTokens:
    return SafetyTokens.load(REPO, subfolder="model-a", **where)


def cached(tmp_path) -> list[str]:
    return [file.name for file in (tmp_path / "cache").rglob("safety_tokens.*") if file.exists()]


def test_published_and_loaded(published):
    assert len(published.log) == 2  # the one that made the repository, and ours
    assert published.tags == {"model-a-v1": published.log[-1]}
    files = published.commits[published.log[-1]]
    assert {path for path in files if "/" in path} == {
        "model-a/README.md",
        "model-a/safety_tokens.json",
        "model-a/safety_tokens.safetensors",
    }
    assert load().ids.tolist() == [5, 3] and load().tokens == ["I", " a|b"]


def test_the_card_tells_use_tokens_and_provenance(published):
    card = published.commits[published.log[-1]]["model-a/README.md"].decode()
    assert f'SafetyTokens.load("{REPO}", subfolder="model-a")' in card
    assert '| 2 | 3 | `" a\\|b"` | 0.25000 | 0.25000 |' in card
    assert "| tokenizer_fingerprint |" in card


def test_the_same_content_makes_no_commit_and_other_content_one(published, server):
    before = len(published.log)
    again = publish(tokens(), REPO, "model-a")
    assert again.changed == [] and len(published.log) == before and list(published.tags) == ["model-a-v1"]
    other = publish(tokens(0.75), REPO, "model-a")
    assert len(published.log) == before + 1 and other.tag == "model-a-v2"
    assert load().weights[0] == 0.75 and load(revision="model-a-v1").weights[0] == 0.5


def test_a_second_model_is_listed_and_leaves_the_first(published):
    publish(tokens(0.75), REPO, "model-b")
    assert load().weights[0] == 0.5
    readme = published.commits[published.log[-1]]["README.md"].decode()
    assert "[model-a](model-a/README.md)" in readme and "[model-b](model-b/README.md)" in readme
    assert set(published.tags) == {"model-a-v1", "model-b-v1"}


def test_a_dry_run_writes_nothing(server):
    done = publish(tokens(), REPO, "model-a", dry_run=True)
    assert len(done.changed) == 4 and done.commit is None
    assert server.repositories == {} and {method for method, _ in server.requests} <= {"GET"}


def test_all_prebuilt_tokens_are_published_by_one_command(server, capsys):
    command = ["tokens", "publish", "--prebuilt", "--repo", REPO]
    assert cli.main([*command, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name.replace('/', '-')}-v1" in out for name in prebuilt_names())
    assert REPO not in server.repositories
    assert cli.main([*command, "--subfolder", "x"]) == 1
    assert "leave DIR and --subfolder out" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert set(server.repositories[REPO].tags) == {f"{name.replace('/', '-')}-v1" for name in prebuilt_names()}


def test_private_makes_private_and_refuses_a_public_one(server):
    publish(tokens(), "tester/secret", "model-a", private=True)
    assert server.repositories["tester/secret"].private
    publish(tokens(), REPO, "model-a")
    with pytest.raises(UserError, match="exists and is public"):
        publish(tokens(0.75), REPO, "model-a", private=True)
    assert len(server.repositories[REPO].log) == 2


def test_without_a_valid_login_nothing_is_published(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="your token is not valid"):
        publish(tokens(), REPO, "model-a")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="you are not logged in: use `hf auth login`"):
        publish(tokens(), REPO, "model-a")
    assert server.repositories == {}


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ""])
def test_bad_folder_names_are_refused(server, name):
    with pytest.raises(UserError, match="no folder name"):
        publish(tokens(), REPO, name)


@pytest.mark.parametrize("action", [500, "drop"])
@pytest.mark.parametrize(("method", "step"), [("PUT", "/lfs/"), ("POST", "/commit/"), ("POST", "/tag/")])
def test_an_interrupted_publish_leaves_nothing_half_written_and_can_be_repeated(
    published, server, method, step, action
):
    server.faults.append(Fault(method, step, action))
    commits = len(published.log)
    with pytest.raises(UserError, match="could not be published") as caught:
        publish(tokens(0.75), REPO, "model-a")
    assert hub_server.TOKEN not in str(caught.value)
    # A commit without its tag is whole; anything before it is no commit at all.
    assert len(published.log) == commits + (step == "/tag/")
    assert list(published.tags) == ["model-a-v1"]
    server.faults.clear()
    publish(tokens(0.75), REPO, "model-a")
    assert len(published.log) == commits + 1
    assert published.tags["model-a-v2"] == published.log[-1] and load().weights[0] == 0.75


def test_passing_failures_are_retried(published, server):
    server.faults += [Fault("GET", "/api/models/", 500, 1), Fault("GET", "/api/models/", 429, 1)]
    assert load().ids.tolist() == [5, 3]
    server.faults[:] = [Fault("POST", "/commit/", 503, 1)]
    publish(tokens(0.75), REPO, "model-a")
    assert published.tags["model-a-v2"] == published.log[-1]


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "not logged in"), (404, "no such repository"), (429, "too many requests"), (500, "error 500")],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/api/models/"), ("HEAD", "/resolve/")])
def test_answers_that_stay_bad(published, server, tmp_path, status, message, method, path):
    server.faults.append(Fault(method, path, status))
    server.requests.clear()
    with pytest.raises(UserError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value) and cached(tmp_path) == []
    asked = sum(1 for request in server.requests if request[0] == method and path in request[1])
    # Waiting helps against 429 and 500, and not against 401 and 404 (two files are asked for side by side).
    assert asked >= hub.ATTEMPTS if status in hub.PASSING else asked <= 2


def test_a_truncated_file_is_fetched_again_or_refused(published, server, tmp_path):
    server.faults.append(Fault("GET", "model-a/safety_tokens.safetensors", "truncate", 1))
    assert load().ids.tolist() == [5, 3]


def test_a_file_that_is_always_truncated_never_enters_the_cache(published, server, tmp_path):
    server.faults.append(Fault("GET", "model-a/safety_tokens.safetensors", "truncate"))
    with pytest.raises(UserError, match="could not be downloaded"):
        load()
    assert "safety_tokens.safetensors" not in cached(tmp_path)


@pytest.mark.parametrize("name", ["safety_tokens.safetensors", "safety_tokens.json"])
def test_a_wrong_hash_is_refused_and_forgotten(published, server, tmp_path, name):
    server.faults.append(Fault("GET", f"model-a/{name}", "corrupt"))
    with pytest.raises(UserError, match=f"'{name}' arrived with hash"):
        load()
    assert name not in cached(tmp_path)
    server.faults.clear()
    assert load().ids.tolist() == [5, 3]


def test_offline_and_without_network_the_cache_serves(published, server, monkeypatch, tmp_path):
    load()
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load().ids.tolist() == [5, 3] and server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        load()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert load().ids.tolist() == [5, 3]


# --- answers that no Hub gives


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/models/"), ("HEAD", "/resolve/")])
def test_a_web_page_instead_of_data_is_called_that(published, server, tmp_path, method, path):
    server.faults.append(Fault(method, path, "html"))
    with pytest.raises(UserError, match="what answers there is not the Hub .*HF_ENDPOINT") as caught:
        load()
    assert "\n" not in str(caught.value) and cached(tmp_path) == []


def test_publishing_to_what_is_no_hub(server):
    server.faults.append(Fault("GET", "/api/whoami-v2", "html"))
    with pytest.raises(UserError, match="what answers there is not the Hub"):
        publish(tokens(), REPO, "model-a")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_forbidden_download_speaks_of_reading_and_a_forbidden_upload_of_writing(published, server, method):
    server.faults.append(Fault(method, "/resolve/", 403))
    with pytest.raises(UserError, match="no right to read it"):
        load()
    server.faults[:] = [Fault("POST", "/commit/", 403)]
    with pytest.raises(UserError, match="use one with write access"):
        publish(tokens(0.75), REPO, "model-a")


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/models/"), ("HEAD", "/resolve/"), ("GET", "/resolve/")])
def test_three_server_errors_are_survived(published, server, method, path):
    server.faults.append(Fault(method, path, 500, 3))
    assert load().ids.tolist() == [5, 3]


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/models/"), ("HEAD", "/resolve/"), ("GET", "/resolve/")])
def test_a_download_that_hangs_ends(published, server, monkeypatch, method, path):
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    server.faults.append(Fault(method, path, "hang"))
    with pytest.raises(UserError, match="did not answer within 0.1 seconds"):
        load()


@pytest.mark.parametrize(("method", "path"), [("GET", "/whoami"), ("POST", "/preupload/"), ("POST", "/commit/")])
def test_an_upload_that_hangs_ends(published, server, monkeypatch, method, path):
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    server.faults.append(Fault(method, path, "hang"))
    with pytest.raises(UserError, match="did not answer within 0.1 seconds"):
        publish(tokens(0.75), REPO, "model-a")


# --- hostile names


@pytest.mark.parametrize("subfolder", ["../..", "..", "a/../..", "/etc/..", "*", "a b", "a\x1b[2J"])
def test_a_subfolder_never_leaves_the_snapshot(published, server, tmp_path, subfolder):
    server.requests.clear()
    with pytest.raises(UserError, match="is no folder name") as caught:
        SafetyTokens.load(REPO, subfolder=subfolder)
    assert server.requests == [] and "\x1b" not in str(caught.value)
    tokens().save(tmp_path / "s")
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="is no folder name"):
        SafetyTokens.load(tmp_path / "x", subfolder=subfolder)


def test_the_card_holds_no_markup_of_others(server):
    evil = tokens()
    evil.provenance.update({"aligned_model": "x`[a](http://evil)|<script>\n# Title\x1b[2J\u202e", "note": ["`|\x9b\n"]})
    evil.tokens[0] = "`|<b>\n\x1b\u202e"
    card = model_card(evil, REPO, "model-a")
    assert all(c.isprintable() or c == "\n" for c in card)
    assert "\n# Title" not in card
    for line in card.splitlines():
        outside = "".join(line.split("`")[::2])
        assert line.count("`") % 2 == 0 or line.startswith("```") or line.startswith("or `")
        assert "<" not in outside and "evil" not in outside
    for row in (line for line in card.splitlines() if line.startswith("| ")):
        assert row.replace("\\|", "").count("|") in (3, 6)


def test_what_is_not_there(published, tmp_path):
    with pytest.raises(
        UserError, match="There is no folder 'nobody/nothing' on this machine, and as .* no such repository"
    ):
        SafetyTokens.load("nobody/nothing")
    with pytest.raises(UserError, match="There is no folder 'nobody/nothing' on this machine, and as a model"):
        hub.model_folder("nobody/nothing")
    with pytest.raises(UserError, match="is neither a folder"):
        SafetyTokens.load(tmp_path / "missing")
    with pytest.raises(UserError, match="no such branch, tag or commit"):
        load(revision="v9")
    with pytest.raises(UserError, match="model-z.* holds no safety tokens"):
        SafetyTokens.load(REPO, subfolder="model-z")
    with pytest.raises(UserError, match="neither a folder, nor NAMESPACE/NAME"):
        SafetyTokens.load("qwen")


def test_known_names(published, monkeypatch):
    with pytest.raises(
        hub.NotPublishedError, match="pact tokens compute --aligned Qwen/Qwen2.5-7B-Instruct --base Qwen/"
    ):
        SafetyTokens.load("Qwen2.5-7B-Instruct")
    monkeypatch.setitem(hub.KNOWN, "model-a", Model("a", "b", published=REPO))
    assert SafetyTokens.load("model-a").ids.tolist() == [5, 3]
