"""A small sample of the campaigns of tests/campaign, which `make campaign` runs whole."""

import pytest

from tests.campaign.bad_configs import Input, inputs, judge, judge_run

CASES = inputs(("demo/pact_lora",))


@pytest.mark.parametrize("start", range(2))
def test_bad_configs(tmp_path, start):
    wrong = []
    for case in CASES[start :: len(CASES) // 15]:
        outcome = judge(case, tmp_path)
        if outcome.verdict != "right":
            wrong.append((case.text, outcome))
    assert not wrong


def test_a_bad_config_leaves_nothing_behind(tmp_path):
    case = next(case for case in CASES if case.key == "optimizer.lr" and case.kind == "negative")
    assert judge_run(case, tmp_path).verdict == "right"


def test_the_judge_sees_what_is_silent_and_what_says_nothing(tmp_path):
    good = next(case for case in CASES if case.key == "epochs" and case.kind == "zero")
    assert (
        judge(Input(good.config, "epochs", "zero", "epochs: 0", good.content, ("epochs=2",)), tmp_path).verdict
        == "silent"
    )
    assert judge(Input(good.config, "nothing", "zero", "nothing", good.content), tmp_path).verdict == "traceback"
