"""What a run does when it is interrupted, when its numbers blow up, and when its state is damaged."""

import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from recipe import logged, run_command, tune_run, tune_run_processes, write_rows
from test_recipe import adapter_of, assert_same_bits

from pact_tune import UserError
from pact_tune.evaluation.records import read_analysis
from pact_tune.run_state import STATE_FILE
from pact_tune.torchtune.checkpoint import HFCheckpointer


def test_damaged_states_are_refused(workspace, tmp_path, monkeypatch):
    """Bit flips anywhere, truncations, another format, no state at all: one sentence each, before weights are loaded."""
    run = [f"output_dir={tmp_path}", "epochs=2", "max_steps_per_epoch=2"]
    assert tune_run(monkeypatch, workspace, *run, "save_every_n_steps=1") is None
    state = tmp_path / STATE_FILE
    good = state.read_bytes()
    again = [*run[:1], "epochs=3", "max_steps_per_epoch=2", "resume_from_checkpoint=True"]
    rng = random.Random(0)
    for place in (rng.randrange(len(good) // 10, len(good) * 9 // 10) for _ in range(12)):
        bad = bytearray(good)
        for offset in range(64):  # beyond the padding between two tensors
            bad[place + offset] ^= 0xFF
        state.write_bytes(bad)
        message = tune_run(monkeypatch, workspace, *again)
        assert "damaged" in message and "\n" not in message
    for size in (0, 100, len(good) // 2, len(good) - 1):
        state.write_bytes(good[:size])
        assert "damaged" in tune_run(monkeypatch, workspace, *again)
    torch.save({"global_step": 1}, state)
    assert "has format 1" in tune_run(monkeypatch, workspace, *again)
    state.unlink()
    assert "to resume from" in tune_run(monkeypatch, workspace, *again)


OWN_OPTIMIZER = """
import torch


class Explodes(torch.optim.SGD):
    'Leaves infinite weights behind at its sixth step.'

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.count = 0

    def step(self, closure=None):
        super().step()
        self.count += self.param_groups[0]["lr"] > 0  # torch steps once with 0 to make a state
        if self.count == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][1].fill_(torch.inf)
"""


@pytest.mark.parametrize("steps_per_epoch", [3, 4])
def test_numbers_that_are_not_finite_end_the_run_and_nothing_of_them_is_saved(
    workspace, tmp_path, monkeypatch, steps_per_epoch
):
    """Met in the next step's loss, or, at the end of an epoch, in the weights themselves; the good epoch stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "explosive.py").write_text(OWN_OPTIMIZER)
    message = tune_run(
        monkeypatch, workspace, f"output_dir={tmp_path}/out", "optimizer._component_=explosive.Explodes", "epochs=3",
        f"max_steps_per_epoch={steps_per_epoch}",
    )  # fmt: skip
    assert "not finite" in message and "\n" not in message
    assert ("after step 6" if steps_per_epoch == 3 else "at step 7") in message
    assert [path.name for path in sorted((tmp_path / "out").glob("epoch_*"))] == ["epoch_0"]
    assert all(tensor.isfinite().all() for tensor in adapter_of(tmp_path / "out").values())


def test_a_result_that_could_not_be_written_is_written_by_the_resumed_run(workspace, tmp_path, monkeypatch):
    """As on a full disk: no step is lost, and the run that only lacks its last result is not called complete."""
    common = ["epochs=2", "max_steps_per_epoch=2"]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/whole", *common) is None
    save = HFCheckpointer.save

    def full(self, name, *rest, **options):
        raise UserError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(HFCheckpointer, "save", full)
        assert "The disk is full." in tune_run(
            monkeypatch, workspace, f"output_dir={tmp_path}/cut", "epochs=2", *common
        )
    calls = []
    monkeypatch.setattr(
        HFCheckpointer, "save", lambda self, name, *rest, **o: calls.append(name) or save(self, name, *rest, **o)
    )
    assert (
        tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/cut", *common, "resume_from_checkpoint=True") is None
    )
    assert calls == ["epoch_0", "epoch_1"]
    for epoch in range(2):
        assert_same_bits(adapter_of(tmp_path / "cut", epoch), adapter_of(tmp_path / "whole", epoch))
    shutil.rmtree(tmp_path / "cut" / "epoch_1")
    assert (
        tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/cut", *common, "resume_from_checkpoint=True") is None
    )
    assert_same_bits(adapter_of(tmp_path / "cut", 1), adapter_of(tmp_path / "whole", 1))
    assert "complete" in tune_run(
        monkeypatch, workspace, f"output_dir={tmp_path}/cut", *common, "resume_from_checkpoint=True"
    )


def test_a_second_run_does_not_mix_its_results_with_those_of_the_first(workspace, tmp_path, monkeypatch):
    run = [f"output_dir={tmp_path}/out", "max_steps_per_epoch=1"]
    assert tune_run(monkeypatch, workspace, *run, "epochs=3") is None
    (tmp_path / "out" / "notes.txt").write_text("mine")
    message = tune_run(monkeypatch, workspace, *run)
    assert "holds the results of another run" in message and "overwrite=True" in message
    assert tune_run(monkeypatch, workspace, *run, "overwrite=True") is None
    assert sorted(path.name for path in (tmp_path / "out").glob("epoch_*")) == ["epoch_0"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("processes", "signum"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_saves_the_state_and_the_run_goes_on_to_the_same_bits(workspace, tmp_path, processes, signum):
    write_rows(tmp_path / "rows.jsonl", 60)
    common = [f"dataset.source={tmp_path}/rows.jsonl", "epochs=8", "batch_size=2", "save_adapter_weights_only=True"]
    started = subprocess.Popen(
        run_command(workspace, f"output_dir={tmp_path}/cut", *common, processes=processes, command="pact"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not list(tmp_path.glob("cut/epoch_0")) and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(signum)
    output, _ = started.communicate(timeout=300)
    assert started.returncode == 128 + signum, output
    assert "Traceback" not in output and "resume_from_checkpoint=True" in output.splitlines()[-1]
    assert not (tmp_path / "cut" / "epoch_7").exists()
    for name, *more in (("cut", "resume_from_checkpoint=True"), ("whole",)):
        done = tune_run_processes(workspace, f"output_dir={tmp_path}/{name}", *common, *more, processes=processes)
        assert done.returncode == 0, done.stderr
    assert_same_bits(adapter_of(tmp_path / "cut", 7), adapter_of(tmp_path / "whole", 7))


def test_validation_rows_are_not_trained_on_and_the_best_epoch_is_named(workspace, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "held_out.jsonl", 7)
    section = [
        "validation_dataset._component_=pact_tune.chat_dataset",
        f"validation_dataset.source={tmp_path}/held_out.jsonl",
    ]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/with", "epochs=2", *section) is None
    assert "the lowest loss so far has epoch_" in capsys.readouterr().out
    assert len(logged(tmp_path / "with", "validation_loss")) == 2
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/without", "epochs=2") is None
    assert_same_bits(adapter_of(tmp_path / "with", 1), adapter_of(tmp_path / "without", 1))


@pytest.mark.parametrize("objective", ["pact", "sft"])
def test_a_run_writes_the_records_of_the_figures_and_trains_as_without(workspace, tmp_path, monkeypatch, objective):
    write_rows(tmp_path / "prompts.jsonl", 5)
    section = [f"analysis.source={tmp_path}/prompts.jsonl", f"analysis.safety_tokens={workspace.parent}/safety_tokens"]
    common = ["epochs=2", "max_steps_per_epoch=2", f"loss.lambda_kl={3 if objective == 'pact' else 0}"]
    for name, *more in (("with", *section, "analysis.rows=3"), ("without",)):
        assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/{name}", *common, *more) is None
    assert_same_bits(adapter_of(tmp_path / "with", 1), adapter_of(tmp_path / "without", 1))
    found = read_analysis(tmp_path / "with")
    assert [record["step"] for record in found["confidence"]] == [0, 2, 4]
    assert all(0 < record["probability"] < 1 for record in found["confidence"])
    assert [(record["epoch"], record["t"]) for record in found["logits"]] == [
        (e, t) for e in range(3) for t in range(4)
    ]
    assert len(found["sample"]) == 9 and all((r["kl"] is None) == (objective == "sft") for r in found["sample"])
    first, last = ([r["ce"] for r in found["sample"] if r["step"] == step] for step in (0, 4))
    assert sum(last) < sum(first)
