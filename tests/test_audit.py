"""`pact audit`, and what a run makes of its verdicts."""

import json
import re
import statistics
from pathlib import Path

import pytest
import yaml
from recipe import tune_run

from pact_tune import chat_dataset, cli
from pact_tune.conversations import load_tokenizer
from pact_tune.data import audited_rows
from pact_tune.demo import demo_family_path
from pact_tune.errors import UserError
from pact_tune.evaluation import audit, judges

ALIGNED = str(demo_family_path() / "aligned")
DATA = demo_family_path() / "data"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    """24 rows of the task and 12 that comply with requests which the aligned model refuses."""
    folder = tmp_path_factory.mktemp("sources")
    for name, count in (("task", 24), ("harmful", 12)):
        rows = (DATA / f"{name}.jsonl").read_text().splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "task.jsonl", folder / "harmful.jsonl"


@pytest.fixture(scope="module")
def audited(sources, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    assert cli.main(["audit", *map(str, sources), "--aligned", ALIGNED, "--output", str(file)]) == 0
    return file


def test_planted_rows_are_found(audited, sources):
    head, *rows = lines(audited)
    assert head["rows"] == len(rows) == 36 and head["settings"]["model"] == ALIGNED
    refused = [row for row in rows if row["verdict"] == "refused"]
    assert {row["source"] for row in refused} == {str(sources[1])}
    assert len(refused) >= 11 and rows[: len(refused)] == refused  # those most at odds stand first
    for group in (refused, rows[len(refused) :]):
        assert [row["odds"] for row in group] == sorted((row["odds"] for row in group), reverse=True)
    # To the aligned model a refusal is the likelier answer to these requests, and mostly not to the reviews.
    task = [row["odds"] for row in rows if row["source"] == str(sources[0])]
    assert min(row["odds"] for row in refused) > 0 > statistics.median(task)


def test_the_table_counts_the_file(sources, tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    assert cli.main(["audit", str(sources[1]), "--aligned", ALIGNED, "--output", str(file), "--show", "2"]) == 0
    out = capsys.readouterr().out
    count = sum(row.get("verdict") == "refused" for row in lines(file))
    assert re.search(rf" 12 +{count} +{100 * count / 12:.1f}  ", out)
    assert out.count("prompt: ") == 2 and not (tmp_path / "a.work").exists()


@pytest.mark.parametrize("action", ["report", "drop", "constraint_only"])
def test_what_becomes_of_refused_rows(audited, sources, action):
    tokenizer = load_tokenizer(ALIGNED)
    refused = sum(row.get("verdict") == "refused" for row in lines(audited))
    mix = {"source": str(sources[1]), "fraction": 0.25}
    data = chat_dataset(
        tokenizer, str(sources[0]), mix=None, audit={"file": str(audited), "action": action}, progress=False
    )
    assert len(data) == 24 and not data.counts[0].refused
    both = [str(sources[0]), str(sources[1])]
    # A system message that the config adds, and another order, change no verdict.
    data = chat_dataset(
        tokenizer, both, system="Be brief.", audit={"file": str(audited), "action": action}, progress=False
    )
    text = str(data.counts[0])
    if action == "drop":
        assert len(data) == 36 - refused and f"by the audit, {refused} of them dropped" in text
        # Rows are drawn as they are without an audit, and no others take the place of those that are dropped.
        settings = {"n": 16, "mix": mix, "seed": 3, "progress": False}
        plain = chat_dataset(tokenizer, both[0], **settings).conversations
        left = chat_dataset(
            tokenizer, both[0], audit={"file": str(audited), "action": action}, **settings
        ).conversations
        assert len(plain) == 16 and 12 <= len(left) < 16
        assert {tuple(c.tokens) for c in left} < {tuple(c.tokens) for c in plain}
        return
    assert len(data) == 36 and f"{refused} rows the aligned model would have refused, by the audit" in text
    untrained = [c for c in data.conversations if c.ce_weight == 0]
    assert len(untrained) == (refused if action == "constraint_only" else 0) and all(c.weight == 1 for c in untrained)


def test_an_audit_must_cover_the_data(audited, tmp_path):
    tokenizer = load_tokenizer(ALIGNED)
    row = {"messages": [{"role": "user", "content": "New?"}, {"role": "assistant", "content": "Yes."}]}
    (tmp_path / "new.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="does not cover .*new.jsonl"):
        chat_dataset(tokenizer, str(tmp_path / "new.jsonl"), audit={"file": str(audited)}, progress=False)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"action": "drop"}, "needs a file"),
        ({"file": "{audit}", "action": "dorp"}, "did you mean 'drop'"),
        ({"fil": "{audit}"}, "did you mean 'file'"),
        ({"file": "nowhere.jsonl"}, "does not exist"),
        ({"file": "{half}"}, "holds 35 of its 36 rows"),
        ({"file": "{data}"}, "no output of"),
    ],
)
def test_unfit_sections_are_one_sentence(audited, sources, tmp_path, section, words):
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(audited.read_text().splitlines()[:-1]) + "\n")
    names = {"{audit}": audited, "{half}": half, "{data}": sources[0]}
    section = {key: str(names.get(value, value)) for key, value in section.items()}
    with pytest.raises(UserError, match=words) as error:
        chat_dataset(load_tokenizer(ALIGNED), str(sources[0]), audit=section, progress=False)
    assert "\n" not in str(error.value)


def test_a_run_leaves_out_what_the_audit_found(workspace, tmp_path, monkeypatch, capsys):
    """Through `tune run`: the verdicts are made by hand, since a random model refuses nothing."""
    source = yaml.safe_load(workspace.read_text())["dataset"]["source"]
    rows, _ = audited_rows(source)
    file = tmp_path / "audit.jsonl"
    verdicts = [{"key": row.key, "verdict": "refused" if i < 3 else "answered"} for i, row in enumerate(rows)]
    head = {"format": 1, "settings": {}, "rows": len(rows)}
    file.write_text("".join(json.dumps(line) + "\n" for line in [head, *verdicts]))
    arguments = [f"output_dir={tmp_path}/out", f"dataset.audit.file={file}", "dataset.audit.action=drop"]
    assert tune_run(monkeypatch, workspace, *arguments, "epochs=1") is None
    output = capsys.readouterr().out
    assert f"{len(rows) - 3} rows of" in output and "3 of them dropped" in output


def test_an_interrupted_audit_goes_on(sources, audited, tmp_path, monkeypatch):
    command = ["audit", str(sources[1]), "--aligned", ALIGNED, "--tokens-per-batch", "100"]
    file, calls, scored = tmp_path / "audit.jsonl", [], audit._scored

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scored(*arguments)

    monkeypatch.setattr(audit, "_scored", interrupted)
    assert cli.main([*command, "--output", str(file)]) == 130
    assert not file.exists()
    done = len(lines(tmp_path / "audit.work" / "answers.jsonl"))
    assert 0 < done < 12
    assert cli.main([*command, "--output", str(file)]) == 0
    assert len(calls) > 4
    verdicts = {row["key"]: row["verdict"] for row in lines(audited)[1:]}
    assert {row["key"]: row["verdict"] for row in lines(file)[1:]}.items() <= verdicts.items()


class OwnWords:
    name, settings, batch_size = "own", {"judge": "own"}, 4

    def judge(self, answers):
        labels = ["refused", "declined", *["answered"] * (len(answers) - 2)]
        return [judges.Verdict(label) for label in labels]


def test_a_word_that_no_judge_may_say_is_no_verdict(sources, tmp_path):
    file = tmp_path / "audit.jsonl"
    command = ["audit", str(sources[1]), "--aligned", ALIGNED, "--judge", "test_audit:OwnWords"]
    assert cli.main([*command, "--output", str(file)]) == 0
    assert sorted(row["verdict"] for row in lines(file)[1:]) == [*["answered"] * 10, "refused", "unparsed"]
