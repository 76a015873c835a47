"""One run in every trainer: equal model, rows, order, initial adapter and settings give equal numbers.

Each trainer writes its numbers to a JSON file, and one test compares the files. Axolotl needs an environment of its own:
An environment of its own, such as Axolotl's, can compare its file with the ones that these tests leave in $PACT_INVARIANT.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from recipe import AT_EXIT, logged, tune_run, write_workspace
from test_hf_recipe import write_hf
from test_trl import PARITY, arguments, history, lora_model, rows_of, trainer
from transformers import AutoModelForCausalLM

from pact_tune.distributed import finish

STEPS = 20
TOKENS = torch.arange(5, 25)[None]
CASES = [("paper", 1), ("tail", 4)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A checkpoint with rows, a config for each backbone, and an adapter whose B is not zero to start from."""
    directory = tmp_path_factory.mktemp("invariant")
    shutil.copy(write_workspace(directory, rows=16), directory / "torchtune.yaml")
    config = write_hf(directory)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert tune_run(monkeypatch, config, f"output_dir={directory}/initial", "optimizer.lr=3e-2") is None
    return directory


def recipe(
    monkeypatch, workspace: Path, out: Path, config: str, preset: str, accumulation: int, *overrides: str
) -> None:
    common = [f"output_dir={out}", f"loss.preset={preset}", f"batch_size={4 // accumulation}", "epochs=5"]
    common += [f"gradient_accumulation_steps={accumulation}", f"reference_cache.directory={out}/cache"]
    assert tune_run(monkeypatch, workspace / config, *common, *PARITY[:2], *overrides) is None
    write(out, logged(out, "ce"), logged(out, "kl"), workspace, out / "epoch_4" / "adapter")


def write(out: Path, ce: list[float], kl: list[float], workspace: Path, adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, adapter)(TOKENS).logits
    (out / "numbers.json").write_text(json.dumps({"ce": ce, "kl": kl, "logits": logits.flatten().tolist()}))


@pytest.mark.parametrize(("preset", "accumulation"), CASES)
def test_numbers_are_the_same_in_every_trainer(workspace, tmp_path, monkeypatch, preset, accumulation):
    adapter = workspace / "initial" / "epoch_0" / "adapter"
    of_torchtune = [f"checkpointer.adapter={adapter}", "model.apply_lora_to_mlp=False"]
    recipe(monkeypatch, workspace, tmp_path / "torchtune", "torchtune.yaml", preset, accumulation, *of_torchtune)
    recipe(
        monkeypatch,
        workspace,
        tmp_path / "transformers",
        "config.yaml",
        preset,
        accumulation,
        f"model.adapter={adapter}",
    )
    settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    args = arguments(workspace, tmp_path / "trl", {"preset": preset}, num_train_epochs=5, **settings)
    run = trainer(workspace, args, lora_model(workspace, adapter))
    run.train()
    run.save_model(str(tmp_path / "trl" / "adapter"))
    write(tmp_path / "trl", history(run, "ce"), history(run, "kl"), workspace, tmp_path / "trl" / "adapter")

    numbers = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("*/numbers.json")}
    assert numbers.keys() == {"torchtune", "transformers", "trl"}
    expected = numbers.pop("torchtune")
    assert len(expected["ce"]) == STEPS and expected["kl"][0] > 1e-3
    for name, found in numbers.items():
        assert found["ce"] == pytest.approx(expected["ce"], abs=1e-4), name
        assert found["kl"] == pytest.approx(expected["kl"], abs=1e-4), name
        assert found["logits"] == pytest.approx(expected["logits"], abs=1e-3), name


def test_trl_on_two_processes_has_the_numbers_of_one(workspace, tmp_path):
    """DDP; in processes of its own, which torchrun starts."""
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), __file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{AT_EXIT}:{Path(__file__).parents[1]}"}
        run = subprocess.run(
            [*command, str(workspace), str(tmp_path / str(processes)), str(4 // processes)],
            env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
    one, two = (json.loads((tmp_path / str(n) / "numbers.json").read_text()) for n in (1, 2))
    assert len(one["ce"]) == 8 and one["kl"][0] > 1e-3
    for name in ("ce", "kl", "eval_loss"):
        assert two[name] == pytest.approx(one[name], abs=1e-4), name


def main(workspace: Path, out: Path, batch_size: int) -> None:
    """A run of TRL, on as many processes as torchrun has started."""
    args = arguments(
        workspace, out, per_device_train_batch_size=batch_size, eval_strategy="epoch", per_device_eval_batch_size=batch_size
    )  # fmt: skip
    run = trainer(
        workspace,
        args,
        lora_model(workspace, workspace / "initial" / "epoch_0" / "adapter"),
        eval_dataset=rows_of(workspace).select(range(8)),
    )
    run.train()
    if run.accelerator.is_main_process:
        names = ("ce", "kl", "eval_loss")
        (out / "numbers.json").write_text(json.dumps({name: history(run, name) for name in names}))
    finish()  # not Python's own end: gloo's threads


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
