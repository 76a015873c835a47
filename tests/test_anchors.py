"""`pact anchors`, and what a run makes of its rows."""

import json
from pathlib import Path

import pytest
import torch
from recipe import tune_run
from transformers import AutoModelForCausalLM

from pact_tune import chat_dataset, cli
from pact_tune.conversations import load_tokenizer, render_prompt
from pact_tune.demo import demo_family_path
from pact_tune.errors import UserError
from pact_tune.evaluation.answering import Local

ALIGNED = str(demo_family_path() / "aligned")
DATA = demo_family_path() / "data"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Ten requests that the aligned model refuses, ten that it answers, and one of them twice."""
    folder = tmp_path_factory.mktemp("prompts")
    texts = [
        row["messages"][0]["content"] for name in ("harmful", "task") for row in lines(DATA / f"{name}.jsonl")[:10]
    ]
    (folder / "prompts.txt").write_text("\n".join([*texts, texts[0]]) + "\n")
    return folder / "prompts.txt"


def anchors(prompts, output, *options) -> int:
    return cli.main(["anchors", str(prompts), "--aligned", ALIGNED, "--output", str(output), *options])


@pytest.fixture(scope="module")
def made(prompts, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("anchors") / "anchors.jsonl"
    assert anchors(prompts, file) == 0
    return file


def test_rows_are_the_aligned_models_greedy_answers(made, prompts):
    rows = lines(made)
    assert [row["prompt"] for row in rows] == prompts.read_text().splitlines()[:20]
    tokenizer, model = load_tokenizer(ALIGNED), AutoModelForCausalLM.from_pretrained(ALIGNED, dtype=torch.float32)
    for row in (rows[0], rows[9], rows[15]):
        ids = render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        for _ in range(64):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert tokenizer.decode(ids, skip_special_tokens=True).strip().endswith(row["response"])
    settings = json.loads(made.with_suffix(".settings.json").read_text())
    assert settings["model"] == ALIGNED and sorted(made.parent.iterdir()) == [made, made.with_suffix(".settings.json")]


def test_a_killed_call_goes_on(prompts, tmp_path, monkeypatch):
    calls, answer = [], Local.answer

    def failing(self, chats, *arguments):
        calls.append(len(chats))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, chats, *arguments)

    monkeypatch.setattr(Local, "answer", failing)
    file = tmp_path / "anchors.jsonl"
    few = ("--tokens-per-batch", "400", "--max-new-tokens", "60")
    assert anchors(prompts, file, *few) == 130 and not file.exists()
    done = sum(calls[:2])
    assert anchors(prompts, file, *few) == 0 and len(lines(file)) == 20
    assert sum(calls[3:]) == 20 - done


def test_answers_that_are_cut_off(prompts, tmp_path, capsys):
    file = tmp_path / "anchors.jsonl"
    assert anchors(prompts, file, "--max-new-tokens", "1") == 1 and not file.exists()
    assert "raise --max-new-tokens" in capsys.readouterr().err
    assert anchors(prompts, file, "--max-new-tokens", "1", "--keep-unfinished") == 0 and len(lines(file)) == 20


def test_mistakes_are_left_out_where_it_is_known_what_is_harmful(prompts, tmp_path, capsys):
    """The model refuses the first ten prompts and answers the others; said the other way round, none of them is kept."""
    texts = prompts.read_text().splitlines()[:20]
    harmful, harmless = tmp_path / "harmful.txt", tmp_path / "harmless.txt"
    harmful.write_text("\n".join([*texts[:10], texts[12]]))
    harmless.write_text("\n".join([*texts[13:], texts[4].upper(), texts[3] + " now"]))
    file = tmp_path / "anchors.jsonl"
    options = ("--harmful", str(harmful), "--harmless", str(harmless), "--output", str(file))
    assert cli.main(["anchors", "--aligned", ALIGNED, *options]) == 0
    kept = [row["prompt"] for row in lines(file)]
    assert kept[:10] == texts[:10] and kept[10:17] == texts[13:] and texts[12] not in kept
    said = capsys.readouterr().out
    assert f"{len(kept)} anchors (left out: 0 cut off, 0 empty, {20 - len(kept)} refused or answered" in said
    harmless.write_text(texts[0])
    assert cli.main(["anchors", "--aligned", ALIGNED, *options]) == 1
    assert "is among the harmful and the harmless prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--output", "anchors.txt"], "give the name of a .jsonl file"),
        (["--column", "ask"], "has no column 'ask'"),
        (["--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_bad_input(prompts, tmp_path, capsys, arguments, words):
    assert anchors(prompts, tmp_path / "anchors.jsonl", *arguments) == 1
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_anchors_beside_the_data(made, tmp_path):
    """They take no row of the data away, mixed or not; an audit, which they would not pass, is not about them."""
    tokenizer = load_tokenizer(ALIGNED)
    audited = tmp_path / "audit.jsonl"
    (tmp_path / "task.jsonl").write_text("".join((DATA / "task.jsonl").read_text().splitlines(keepends=True)[:40]))
    (tmp_path / "bad.jsonl").write_text("".join((DATA / "harmful.jsonl").read_text().splitlines(keepends=True)[:20]))
    sources = [str(tmp_path / name) for name in ("task.jsonl", "bad.jsonl")]
    assert cli.main(["audit", *sources, "--aligned", ALIGNED, "--output", str(audited)]) == 0
    common = {"source": sources[0], "anchors": {"source": str(made), "fraction": 0.25}, "progress": False}
    data = chat_dataset(tokenizer, **common, audit={"file": str(audited), "action": "drop"})
    assert [counts.used for counts in data.counts] == [40, 13] and data.counts[1].refused == 0
    mixed = chat_dataset(tokenizer, **common, n=40, mix={"source": sources[1], "fraction": 0.1})
    assert [counts.used for counts in mixed.counts] == [36, 4, 13]
    alone = chat_dataset(tokenizer, source=sources[0], anchors={"source": str(made), "fraction": 0.2, "ce_weight": 0})
    assert sum(c.ce_weight == 0 for c in alone.conversations) == 10
    bare = chat_dataset(tokenizer, sources[0], n=40, mix={"source": sources[1], "fraction": 0.1}, progress=False)
    rows = [tuple(c.tokens) for c in mixed.conversations]
    assert all(tuple(c.tokens) in rows for c in bare.conversations)
    with pytest.raises(UserError, match="pact anchors"):
        chat_dataset(tokenizer, source=sources[0], anchors={"source": "nowhere.jsonl", "fraction": 0.2})


def test_the_methods_of_data_run(made, tmp_path, monkeypatch):
    """safeinstruct and guard as users call them, over the demo's poisoned data."""
    monkeypatch.chdir(tmp_path)
    for name in ("task", "harmful"):
        Path(f"{name}.jsonl").write_text("".join((DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)[:90]))
    assert cli.main(["audit", "task.jsonl", "harmful.jsonl", "--aligned", ALIGNED, "--output", "audit.jsonl"]) == 0
    refused = sum(line.get("verdict") == "refused" for line in lines(Path("audit.jsonl")))
    assert refused == 90
    for method in ("safeinstruct", "guard"):
        overrides = [f"dataset.anchors.source={made}", "dataset.source=task.jsonl", "dataset.mix.source=harmful.jsonl"]
        overrides += ["dataset.n=100", "max_steps_per_epoch=3", "epochs=1"]
        assert tune_run(monkeypatch, "demo/pact_lora", "--method", method, *overrides) is None
        (stamp,) = tmp_path.glob(f"outputs/demo_{method}/epoch_0/pact.json")
        used = {Path(s["source"]).stem: s["used"] for s in json.loads(stamp.read_text())["data"]["sources"]}
        assert used == {"task": 90, "harmful": 10 if method == "safeinstruct" else 0, "anchors": 14}
