"""benchmarks/gpu.py on a CPU, every line of it: what it writes, and that nothing is passed over in silence."""

import argparse
import csv
import dataclasses
import time

import pytest
import torch

from benchmarks import gpu, step

TINY = ["--device", "cpu", "--tiny", "--minutes", "120"]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Of one run of everything."""
    folder = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # inductor takes minutes on a CPU
        assert gpu.main([*TINY, "--output", str(folder)]) == 0
    return folder


def test_every_check_ran_and_was_good(output):
    checks = rows(output / "checks.csv")
    assert {(row["backbone"], row["check"]) for row in checks} == {
        (backbone, check.name) for check in gpu.CHECKS for backbone in check.backbones
    }
    assert all(row["good"] == "True" for row in checks)
    compared = {row["what"] for row in checks}
    assert compared == {
        "loss", "trained model", "reference", "reference, stored and live", "merged checkpoint", "PEFT adapter"
    }  # fmt: skip
    assert any(float(row["difference"]) > 1e-3 for row in checks if row["check"] == "bfloat16")


def test_every_contender_made_every_step(output):
    steps = rows(output / "steps.csv")
    found = [(row["work"], row["turn"], row["contender"]) for row in steps]
    assert sorted(found) == sorted(
        [(work, turn, name) for work in gpu.STEPS for turn, beside in gpu.TURNS.items() for name in (turn, *beside)]
        + [(gpu.FILLED, "filling", name) for name in ("filling", "filling apart", "warm epoch")]
    )
    assert all(float(row["to_warm"]) == 1 for row in steps if row["contender"] in ("warm", "warm epoch"))
    assert all(float(row["median_s"]) > 0 for row in steps)
    assert "torch" in (output / "environment.txt").read_text()


def broken(*_):
    raise ImportError("no such trainer")


def test_what_cannot_be_run_fails_by_name_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "trl_step", broken)
    monkeypatch.setattr(gpu, "TURNS", {"TRL SFT": ("warm",), "published": ("warm",)})
    monkeypatch.setattr(step, "measure_filling", broken)
    assert gpu.main([*TINY, "--output", str(tmp_path), "--parts", "steps"]) == 1
    out = capsys.readouterr().out
    assert "2 failed" in out and "tiny, TRL SFT: ImportError no such trainer" in out
    assert {row["contender"] for row in rows(tmp_path / "steps.csv")} == {"published", "warm"}


def test_numbers_that_differ_fail(tmp_path, monkeypatch, capsys):
    """A rate that is a tenth higher is seen, and so is a run that trains nothing, on one side or on both."""
    rates = {"a little more": ("1.1e-2", "1e-2"), "nothing": ("1e-12", "1e-2"), "nothing on both": ("1e-12", "1e-12")}
    checks = (gpu.Check(name, *((f"optimizer.lr={rate}",) for rate in pair)) for name, pair in rates.items())
    monkeypatch.setattr(gpu, "BACKBONES", {"torchtune": []})
    monkeypatch.setattr(gpu, "CHECKS", tuple(dataclasses.replace(check, backbones=("torchtune",)) for check in checks))
    assert gpu.main([*TINY, "--output", str(tmp_path), "--parts", "checks"]) == 1
    out = capsys.readouterr().out
    assert "torchtune, a little more: trained model differs by" in out
    assert "torchtune, nothing: trained model differs by 1.00e+00" in out
    assert "torchtune, nothing on both: ValueError training moved the model by" in out
    assert {row["good"] for row in rows(tmp_path / "checks.csv") if row["what"] == "trained model"} == {"False"}


def test_what_is_missing_is_said_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", {"torch": None, "torchtune": "0.1", "no-such-package": "1.0"})
    assert gpu.main([*TINY, "--output", str(tmp_path / "out")]) == 1
    assert "Not installed: no-such-package==1.0, torchtune==0.1 (there is 0.6.1)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "out")]) == 1
    assert "no CUDA GPU here" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_experiment_that_fails_or_is_cut_is_a_failure(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    base = [*TINY, "--output", str(tmp_path), "--parts", "--story"]
    assert gpu.main([*base, "no-such-story"]) == 1
    out, err = capfd.readouterr()
    assert "story: `pact experiment no-such-story` ended with 1" in out and "no-such-story" in err
    cut = gpu.run_story(argparse.Namespace(story="demo/overview", jobs=1, device="cpu"), time.monotonic() + 1)
    assert cut == ["story: `pact experiment demo/overview` was not done when the time was up"]
    monkeypatch.setattr(gpu.subprocess, "Popen", broken)
    assert gpu.main([*base, "demo/overview", "--minutes", "0"]) == 1
    assert "story: no time was left for demo/overview" in capfd.readouterr().out


def test_nothing_is_begun_when_the_time_is_up(tmp_path, capsys):
    assert gpu.main([*TINY, "--output", str(tmp_path), "--minutes", "0", "--parts", "steps"]) == 1
    assert "2 failed" in (out := capsys.readouterr().out) and "no time was left" in out
