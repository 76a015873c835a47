"""`pact tokens ...` as a user types it: exit codes, one-sentence errors, and the files that appear."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import tiny
import torch

from pact_tune import cli
from pact_tune.errors import UserError, printable
from pact_tune.intervention import TokenIntervention, keyword_judge
from pact_tune.prompts import column, read_prompts
from pact_tune.safety_tokens import SafetyTokens

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["How do I paint the fence?", "What is seven plus nine?", "positive or", "Is this"]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny.tiny_model(folder / "aligned", seed=1)
    tiny.tiny_model(folder / "base", seed=2)
    rows = [{"goal": p, "kind": "odd" if i % 2 else "even"} for i, p in enumerate(PROMPTS)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "benign.txt").write_text("What is seven plus nine?\nclean a window\n")
    assert compute(folder, "s") == 0
    return folder


def compute(folder: Path, output: str, *more: str) -> int:
    places = ["--aligned", f"{folder}/aligned", "--base", f"{folder}/base", "--prompts", f"{folder}/p.jsonl"]
    options = ["--prompt-column", "goal", "-k", "6", "--max-response-tokens", "8", "--output", f"{folder}/{output}"]
    return cli.main(["tokens", "compute", *places, *options, *more])


def test_compute_writes_the_folder_and_clears_its_work(here, capsys):
    assert compute(here, "more", "--benign-prompts", f"{here}/benign.txt", "--preset", "official") == 0
    out = capsys.readouterr().out
    assert "Stability" in out and "Mere style" in out and f"Written to {here}/more" in out
    assert not (here / "more.work").exists()
    options = SafetyTokens.load(here / "more").provenance["options"]
    assert options["ranking"] == "reference_probability" and options["average"] == "macro"
    assert options["max_response_tokens"] == 8  # the command line over the preset


def test_where_and_number_choose_prompts(here):
    assert compute(here, "few", "--where", "kind=even", "--num-prompts", "1") == 0
    assert SafetyTokens.load(here / "few").provenance["num_prompts"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompt-column", "nope"], "no column 'nope'; it has: goal, kind"),
        (["--where", "kind=zzz"], "holds no rows with kind=zzz"),
        (["--where", "kind"], "COLUMN=VALUE"),
        (["--num-prompts", "0"], "at least 1"),
        (["--prompts", "absent.jsonl"], "'absent.jsonl' does not exist"),
        (["--leave-out-style"], "benign prompts"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(here, capsys, more, message):
    assert compute(here, "bad", *more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pact: ") and message in error
    assert not (here / "bad").exists()


@pytest.mark.parametrize("there", ["notes.txt", "settings.json"])
def test_others_folders_are_refused_before_any_work(here, tmp_path, capsys, there):
    for name in ("proj", "work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / there).write_text("precious")
    (tmp_path / "work" / "notes.txt").write_text("precious")
    template = ["tokens", "from-templates", "--tokenizer", f"{here}/aligned", "--output", f"{tmp_path}/proj"]
    download = ["tokens", "download", "nobody/nothing", "--output", f"{tmp_path}/proj"]
    assert cli.main(template) == cli.main(download) == 1
    assert compute(here, "s", "--output", f"{tmp_path}/proj") == 1
    assert compute(here, "s", "--output", f"{tmp_path}/new", "--work-dir", f"{tmp_path}/work") == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 4 and all("was not written by this command" in error for error in errors)
    assert not (tmp_path / "new").exists()
    for name in ("proj", "work"):
        assert (tmp_path / name / there).read_text() == "precious" == (tmp_path / "work" / "notes.txt").read_text()


def test_a_finished_work_folder_loses_its_own_files_only(tmp_path):
    from pact_tune.identification import remove_work_dir

    for name in ("settings.json", "responses-harmful-00001.json", "sums-harmful-base-0-of-1.safetensors", "notes.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".settings.json.0123456789abcdef.pact.partial").write_text("x")
    remove_work_dir(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_a_removal_that_is_killed_leaves_a_work_folder_that_is_known_as_ours(tmp_path, monkeypatch):
    from pact_tune.identification import check_work_dir, remove_work_dir

    names = ["settings.json", "responses-harmful-00001.json", "sums-harmful-base-0-of-1.safetensors"]
    for name in names:
        (tmp_path / name).write_text("x")
    removed = []

    def unlink(path, missing_ok=False):
        os.unlink(path)
        removed.append(path.name)
        if len(removed) < 3:
            check_work_dir(tmp_path)  # as the command does that goes on after a kill

    monkeypatch.setattr(Path, "unlink", unlink)
    remove_work_dir(tmp_path)
    assert sorted(removed) == sorted(names)


def test_show_plots_and_covers(here, tmp_path, capsys):
    assert cli.main(["tokens", "show", f"{here}/s", "--plot", f"{tmp_path}/s.png"]) == 0
    tokens, out = SafetyTokens.load(here / "s"), capsys.readouterr().out
    for token_id, text in zip(tokens.ids.tolist(), tokens.tokens, strict=True):
        assert any(str(token_id) in row and printable(text) in row for row in out.splitlines())
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["tokens", "show", f"{here}/s", "--plot", f"{tmp_path}/s.xyz"]) == 1
    assert cli.main(["tokens", "show", f"{here}/s", "--aligned", f"{here}/aligned"]) == 1
    assert "both --aligned and --prompts" in capsys.readouterr().err


def test_coverage_is_the_first_tokens_mass(here, capsys, monkeypatch):
    monkeypatch.setattr("pact_tune.intervention.keyword_judge", lambda answer, ended: "refusal")
    arguments = ["--aligned", f"{here}/aligned", "--prompts", f"{here}/p.jsonl", "--prompt-column", "goal"]
    assert cli.main(["tokens", "show", f"{here}/s", *arguments]) == 0
    shown = float(capsys.readouterr().out.split("S holds ")[1].split(" %")[0])
    from transformers import AutoModelForCausalLM

    from pact_tune.conversations import load_tokenizer, render_prompt

    tokenizer = load_tokenizer(f"{here}/aligned")
    model = AutoModelForCausalLM.from_pretrained(here / "aligned").eval()
    ids = SafetyTokens.load(here / "s").ids
    mass = [
        model(torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": p}])])).logits[0, -1].softmax(-1)[ids]
        for p in PROMPTS
    ]
    assert shown == pytest.approx(100 * torch.stack(mass).sum(1).mean().item(), abs=0.051)


def test_diff_counts_common_tokens_and_refuses_other_tokenizers(here, tmp_path, capsys):
    tokens = SafetyTokens.load(here / "s")
    tokens.select(3, "score", "raw").save(tmp_path / "three")
    assert cli.main(["tokens", "show", f"{here}/s", "--diff", f"{tmp_path}/three"]) == 0
    assert "3 tokens in both, 3 only in the first, 0 only in the second" in capsys.readouterr().out
    tokens.provenance["tokenizer_fingerprint"] = "0" * 32
    tokens.save(tmp_path / "other")
    assert cli.main(["tokens", "show", f"{here}/s", "--diff", f"{tmp_path}/other"]) == 1
    assert "tokenizer 00000000" in capsys.readouterr().err


def test_from_templates(here, tmp_path, capsys):
    arguments = ["--tokenizer", f"{here}/aligned", "--output", f"{tmp_path}/t", "-k", "5"]
    assert cli.main(["tokens", "from-templates", *arguments]) == 0
    assert "not measured" in capsys.readouterr().out
    tokens = SafetyTokens.load(tmp_path / "t")
    assert len(tokens) == 5 and tokens.weights.tolist() == [1.0] * 5
    assert cli.main(["tokens", "show", f"{tmp_path}/t"]) == 0
    assert "Not measured" in capsys.readouterr().out


def test_intervention_changes_only_its_tokens():
    scores, ids = torch.zeros(2, 5), torch.tensor([1, 3])
    assert TokenIntervention(ids, 5.0)(None, scores).tolist() == [[0, 5, 0, 5, 0]] * 2
    ablated = TokenIntervention(ids, None)(None, scores)
    assert ablated.softmax(-1)[0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])
    assert scores.abs().sum() == 0
    assert torch.isfinite(TokenIntervention(ids, None)(None, scores.half())).all()


def test_keyword_judge():
    assert keyword_judge("I’m sorry, but no.", True) == "refusal"
    assert keyword_judge("Sure, here is how.", True) == "helpful"


def test_intervene_prints_every_arm(here, capsys):
    arguments = ["--tokens", f"{here}/s", "--prompts", f"{here}/p.jsonl", "--prompt-column", "goal", "--draws", "1"]
    assert cli.main(["tokens", "intervene", "--model", f"{here}/aligned", *arguments, "--max-new-tokens", "4"]) == 0
    out = capsys.readouterr().out
    for arm in ("none", "boost safety", "ablate safety", "boost random", "ablate random"):
        assert any(row.startswith(arm) for row in out.splitlines())
    bad = ["tokens", "intervene", "--model", f"{here}/aligned", *arguments, "--judge", "nobody"]
    assert cli.main(bad) == 1 and "There is no judge 'nobody'" in capsys.readouterr().err


def test_intervene_refuses_tokens_of_another_tokenizer(here, tmp_path, capsys):
    tokens = SafetyTokens.load(here / "s")
    tokens.provenance["tokenizer_fingerprint"] = "0" * 32
    tokens.save(tmp_path / "other")
    arguments = ["--tokens", f"{tmp_path}/other", "--prompts", f"{here}/p.jsonl", "--prompt-column", "goal"]
    assert cli.main(["tokens", "intervene", "--model", f"{here}/aligned", *arguments]) == 1
    assert "tokenizer 00000000" in capsys.readouterr().err


def test_publish_and_download_by_the_environment_alone(here, tmp_path):
    """Fresh processes that know the Hub by HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE only; scripts and command alike."""
    with hub_server.serve() as server:
        environment = os.environ | {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": hub_server.TOKEN,
            "HF_HUB_OFFLINE": "0",
        }

        def run(tool: list[str], *arguments: str, **more: str) -> subprocess.CompletedProcess:
            command = [sys.executable, *tool, *arguments]
            done = subprocess.run(command, env=environment | more, cwd=tmp_path, capture_output=True, text=True)
            assert hub_server.TOKEN not in done.stdout + done.stderr
            return done

        publish = [f"{ROOT}/tools/publish_safety_tokens.py", str(here / "s")]
        download = ["-m", "pact_tune.cli", "tokens", "download", "tester/family", "--subfolder", "m"]
        done = run(publish, "--repo", "tester/family", "--subfolder", "m")
        assert done.returncode == 0 and "Published to tester/family as m-v1" in done.stdout, done.stderr
        assert run(download, "--output", "first").returncode == 0
        server.requests.clear()
        assert run(download, "--output", "second", HF_HUB_OFFLINE="1").returncode == 0
        assert server.requests == []
    for name in ("safety_tokens.safetensors", "safety_tokens.json"):
        written = (here / "s" / name).read_bytes()
        assert (tmp_path / "first" / name).read_bytes() == written == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"prompt": "a\u2028b"}\n', ["a\u2028b"]),
        ("a.json", '["a", {"prompt": "b"}]', ["a", "b"]),
        ("a.csv", 'prompt,n\n"two\nlines",1\n', ["two\nlines"]),
        ("a.tsv", 'prompt\tn\nsay "hi"\t1\n', ['say "hi"']),
        ("a.txt", "\ufeffone\n\n two \n", ["one", "two"]),
    ],
)
def test_prompt_files(tmp_path, name, text, expected):
    (tmp_path / name).write_bytes(text.encode())
    assert column(read_prompts(tmp_path / name), "prompt", name) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{oops\n', "line 2"),
        ("a.jsonl", "3\n", "Row 1"),
        ("a.json", "{}", "not a JSON list"),
        ("a.csv", "prompt,n\na,1\n,2\n", "Row 2"),
        ("a.csv", "prompt\n", "holds no rows"),
        ("a.csv", "prompt,n\na, b,1\n", "more fields than columns at line 2"),
        ("a.csv", 'prompt,n\n"a,1\n', "not valid CSV"),
        ("a.pdf", "x", "unknown kind"),
    ],
)
def test_bad_prompt_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        column(read_prompts(tmp_path / name), "prompt", name)


def test_the_same_model_twice_is_refused_before_anything_is_measured(here, tmp_path, capsys):
    import shutil

    shutil.copytree(here / "aligned", tmp_path / "copy")
    for base in (here / "aligned", tmp_path / "copy"):
        assert compute(here, "same", "--base", str(base)) == 1
        assert "are the same model" in capsys.readouterr().err
    assert not (here / "same").exists() and not (here / "same.work").exists()


def test_two_models_that_answer_alike_are_not_called_uniform(here, tmp_path, capsys):
    """The same weights behind another config.json."""
    import shutil

    shutil.copytree(here / "aligned", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"_name_or_path": "other"}))
    for weighting in ("raw", "uniform"):
        assert compute(here, "alike", "--base", f"{tmp_path}/copy", "--weighting", weighting) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "answer alike and nothing was measured" in error and "use weighting" not in error
    assert not (here / "alike").exists()


def test_the_weights_that_were_measured_are_recorded(here):
    from pact_tune.fingerprints import model_fingerprint

    provenance = SafetyTokens.load(here / "s").provenance
    assert provenance["aligned_weights"] == model_fingerprint(here / "aligned")
    assert provenance["options"]["trust_remote_code"] is False


CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
Path("{ran}").touch()
class OwnTokenizer(PreTrainedTokenizerFast): pass
class OwnConfig(Qwen2Config): model_type = "own"
class OwnModel(Qwen2ForCausalLM): config_class = OwnConfig
"""


def test_a_models_own_code_runs_only_where_it_is_allowed(here, tmp_path, capsys, monkeypatch):
    """With a "y" on standard input, which transformers would take for leave."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    tokenizer, model, ran = tmp_path / "tokenizer", tmp_path / "model", tmp_path / "ran"
    for folder in (tokenizer, model):
        tiny.tiny_model(folder, seed=3)
        (folder / "own.py").write_text(CODE.replace("{ran}", str(ran)))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(config))

    template = ["tokens", "from-templates", "--tokenizer", str(tokenizer), "--output", f"{tmp_path}/t"]
    cli.main(template)  # transformers has a class of its own for such a tokenizer
    assert not ran.exists()
    aligned, base = ["--aligned", str(model)], ["--aligned", f"{here}/base", "--base", str(model)]
    cover = ["tokens", "show", f"{here}/s", "--aligned", str(model), "--prompts", f"{here}/p.jsonl"]
    cover += ["--prompt-column", "goal"]
    intervene = ["tokens", "intervene", "--model", str(model), "--tokens", *cover[2:3], *cover[5:]]
    refused = [lambda: compute(here, "own", *aligned), lambda: compute(here, "other", *base)]
    refused += [lambda: cli.main(cover), lambda: cli.main(intervene)]
    for command in refused:
        assert command() == 1
        assert "needs code of its own to be run" in capsys.readouterr().err.strip().splitlines()[-1]
        assert not ran.exists() and not (here / "own").exists()

    assert cli.main([*template, "--trust-remote-code"]) == 0
    assert ran.exists()
    ran.unlink()
    assert compute(here, "own", *aligned, "--trust-remote-code") == 0
    assert ran.exists() and SafetyTokens.load(here / "own").provenance["options"]["trust_remote_code"] is True


def test_a_traceback_is_shown_on_request_only(tmp_path):
    command = [sys.executable, "-m", "pact_tune.cli", "tokens", "show", f"{tmp_path}/absent"]
    for debug, traceback in (("0", False), ("1", True)):
        environment = os.environ | {"PACT_TUNE_DEBUG": debug}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 1 and ("Traceback" in done.stderr) == traceback
        assert "is neither a folder" in done.stderr.splitlines()[-1]
