"""A small sample of the campaigns of tests/campaign, which `make campaign` runs whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.bad_configs import Input, inputs, judge

CASES = inputs(("demo/pact_lora",))


@pytest.mark.parametrize("start", range(2))
def test_bad_configs(tmp_path, start):
    wrong = []
    for case in CASES[start :: len(CASES) // 15]:
        outcome = judge(case, tmp_path)
        if outcome.verdict != "right":
            wrong.append((case.text, outcome))
    assert not wrong


def test_the_judge_sees_what_is_silent_and_what_says_nothing(tmp_path):
    good = next(case for case in CASES if case.key == "epochs" and case.kind == "zero")
    assert (
        judge(Input(good.config, "epochs", "zero", "epochs: 0", good.content, ("epochs=2",)), tmp_path).verdict
        == "silent"
    )
    assert judge(Input(good.config, "nothing", "zero", "nothing", good.content), tmp_path).verdict == "traceback"


def test_kills_damaged_files_full_disks_company_and_bad_configs(tmp_path):
    """In a process of its own: it forks, and must not have trained before."""
    command = [sys.executable, "-m", "tests.campaign", "--small", "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| all |") == 4
    assert len(list(tmp_path.glob("*.md"))) == 4 and "| right |" in (tmp_path / "bad_configs.md").read_text()


def test_the_judge_of_damage_sees_what_is_taken_and_what_is_a_traceback(tmp_path):
    code = """
from tests.campaign.damage import KINDS, judge
from tests.campaign.processes import Done
covered, row = (next(kind for kind in KINDS if kind.name == name) for name in ("pact.json", "rows.jsonl"))
sentence = "pact: the file is damaged: take it from where it was made."
for kind, code, said, verdict in (
    (covered, 0, "", "silent"), (row, 0, "", "right"), (covered, 1, sentence, "right"), (covered, -11, "", "traceback"),
    (covered, 1, "Traceback (most recent call last)", "traceback"), (covered, 1, "no", "traceback"),
    (covered, 1, sentence + chr(10) + "more", "traceback"),
):
    assert judge(kind, None, "bit 0 of byte 1 flipped", Done(code, said, 1.0), b"12", b"13") == verdict, (kind, said)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
