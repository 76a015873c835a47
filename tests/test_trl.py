"""TRL's trainer with our objective: the recipe's numbers, accumulation, packing, evaluation, resumption, the stamp."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from recipe import logged, tune_run, write_rows
from safetensors.torch import load_file
from test_hf_recipe import LORA, write_hf
from transformers import AutoModelForCausalLM

from pact_tune import chat_dataset, load_tokenizer
from pact_tune.data import audited_rows
from pact_tune.errors import UserError
from pact_tune.evaluation.records import read_analysis
from pact_tune.hf import PACTTrainer, PACTTrainingConfig
from pact_tune.objectives import Objective, sft
from pact_tune.stamp import read_stamp
from pact_tune.tools import verify

OBJECTIVE = {"preset": "paper", "weighting": "uniform", "k": 10}
PARITY = ["shuffle=False", "batch_by_length=False", "epochs=2"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("trl")).parent


def rows_of(workspace: Path) -> Dataset:
    lines = (workspace / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return Dataset.from_list([{"prompt": row["instruction"], "completion": row["output"]} for row in rows])


def arguments(workspace: Path, out: Path, objective: dict | None = None, **settings) -> PACTTrainingConfig:
    """The recipe's settings, so that numbers can be compared."""
    defaults = {
        "objective": {"safety_tokens": str(workspace / "safety_tokens"), **OBJECTIVE, **(objective or {})},
        "reference_cache": {"directory": str(out / "cache"), "dtype": "float32"},
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,  # torch's AdamW
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return PACTTrainingConfig(str(out), **defaults | settings)


def lora_model(workspace: Path, adapter: Path) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


def trainer(workspace: Path, args: PACTTrainingConfig, model=None, **more) -> PACTTrainer:
    model = str(workspace / "model") if model is None else model
    rows = more.pop("train_dataset", None) or rows_of(workspace)
    return PACTTrainer(model, args, rows, processing_class=load_tokenizer(str(workspace / "model")), **more)


def history(run: PACTTrainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.fixture(scope="module")
def initial(workspace, tmp_path_factory) -> Path:
    """An adapter whose B is not zero, by the recipe."""
    out = tmp_path_factory.mktemp("initial")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert tune_run(monkeypatch, workspace / "config.yaml", f"output_dir={out}", "optimizer.lr=3e-2") is None
    return out / "epoch_0" / "adapter"


def test_packed_numbers_are_the_recipes(workspace, initial, tmp_path, monkeypatch):
    overrides = [f"output_dir={tmp_path}/recipe", "loss.preset=tail", f"model.adapter={initial}", *PARITY]
    assert tune_run(monkeypatch, workspace / "config.yaml", *overrides) is None
    args = arguments(workspace, tmp_path / "trl", {"preset": "tail"}, padding_free=True, max_length=None)
    run = trainer(workspace, args, lora_model(workspace, initial))
    run.train()
    for name in ("ce", "kl", "gate", "loss"):
        expected = logged(tmp_path / "recipe", name)
        assert len(expected) == 8 and history(run, name) == pytest.approx(expected, abs=1e-4), name
    args = arguments(workspace, tmp_path / "more", {"preset": "tail"}, packing=True, max_length=128)
    packed = trainer(workspace, args, lora_model(workspace, initial))
    assert len(packed.train_dataset) < 16  # several rows an example
    packed.train()
    assert history(packed, "kl")[0] > 1e-3


def test_evaluation_resumption_and_the_stamp(workspace, initial, tmp_path, capsys):
    settings = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch"}
    runs = {}
    for name, stop in (("whole", None), ("cut", 3), ("cut", None)):
        args = arguments(workspace, tmp_path / name, max_steps=-1 if stop is None else stop, **settings)
        run = runs[name] = trainer(
            workspace, args, lora_model(workspace, initial), eval_dataset=rows_of(workspace).select(range(6))
        )
        run.train(resume_from_checkpoint=stop is None and name == "cut" or None)
    weights = []
    for name, run in runs.items():
        run.save_model(str(tmp_path / name / "final"))
        weights.append(load_file(tmp_path / name / "final" / "adapter_model.safetensors"))
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name
    run = runs["whole"]
    assert history(run, "eval_loss")[-1] == pytest.approx(history(run, "eval_ce")[-1] + 3 * history(run, "eval_kl")[-1])

    rows = ["--data", str(workspace / "rows.jsonl"), "--rows", "2"]
    for folder in (tmp_path / "whole" / "final", tmp_path / "whole" / "checkpoint-6"):
        assert verify.main([str(folder), *rows]) == 0
    assert read_stamp(folder)["machine"]["processes"] == 1
    assert "was trained with the constraint 'pact'" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data"):
        verify.main([str(tmp_path / "whole" / "final")])


def test_a_fresh_adapter_and_a_reference_that_keeps_the_initial_one_start_at_zero(workspace, initial, tmp_path):
    args = arguments(workspace, tmp_path / "a", {"preset": "tail"}, reference_cache=None, gradient_checkpointing=True)
    fresh = trainer(workspace, args, peft_config=LoraConfig(**LORA))
    args = arguments(workspace, tmp_path / "b", {"preset": "tail"}, reference="initial")
    kept = trainer(workspace, args, lora_model(workspace, initial))
    frozen = {n: p.clone() for n, p in kept.model.named_parameters() if ".reference." in n}
    for run in (fresh, kept):
        run.train()
        kl = history(run, "kl")
        assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 1e-4
    assert all(torch.equal(p, frozen[n]) for n, p in kept.model.named_parameters() if ".reference." in n)


@pytest.mark.parametrize("action", ["report", "drop", "constraint_only"])
def test_rows_that_the_aligned_model_would_have_refused(workspace, initial, tmp_path, monkeypatch, action):
    """As in the recipe; the whole first step is of such rows, so with "constraint_only" nothing is trained there."""
    rows, _ = audited_rows(str(workspace / "rows.jsonl"))
    verdicts = [{"key": row.key, "verdict": "refused" if i < 5 else "answered"} for i, row in enumerate(rows)]
    head = {"format": 1, "settings": {}, "rows": len(rows)}
    file = tmp_path / "audit.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [head, *verdicts]))
    section = {"file": str(file), "action": action}
    overrides = [f"dataset.audit.{key}={value}" for key, value in section.items()]
    overrides += [f"output_dir={tmp_path}/recipe", f"model.adapter={initial}", *PARITY[:2], "epochs=1"]
    assert tune_run(monkeypatch, workspace / "config.yaml", *overrides) is None
    args = arguments(workspace, tmp_path / "trl", audit=section, num_train_epochs=1)
    # Evaluated on the same rows, with the weights of others: those of training count.
    run = trainer(workspace, args, lora_model(workspace, initial), eval_dataset=rows_of(workspace))
    assert len(run.train_dataset) == (11 if action == "drop" else 16)
    run.train()
    for name in ("ce", "kl", "loss"):
        expected = logged(tmp_path / "recipe", name)
        assert len(expected) == (3 if action == "drop" else 4)
        assert history(run, name) == pytest.approx(expected, abs=1e-4), name
    assert (history(run, "ce")[0] == 0) == (action == "constraint_only") and history(run, "kl")[0] > 1e-3


def test_records_of_the_figures_and_a_stamp_that_names_its_rows(workspace, initial, tmp_path, monkeypatch, capsys):
    prompts = write_rows(tmp_path / "prompts.jsonl", 5)
    section = {"source": str(prompts), "safety_tokens": str(workspace / "safety_tokens"), "rows": 3}
    overrides = [f"analysis.{key}={value}" for key, value in section.items()]
    overrides += [f"output_dir={tmp_path}/recipe", f"model.adapter={initial}", *PARITY]
    assert tune_run(monkeypatch, workspace / "config.yaml", *overrides) is None
    rows = chat_dataset(load_tokenizer(str(workspace / "model")), workspace / "rows.jsonl")
    weights = []
    for name, analysis in (("with", section), ("without", None)):
        args = arguments(workspace, tmp_path / name, analysis=analysis, logging_steps=100)
        run = trainer(workspace, args, lora_model(workspace, initial), train_dataset=rows, eval_dataset=rows)
        if analysis:  # they begin with the training, also where an evaluation comes first
            run.evaluate()
        run.train()
        (tmp_path / name / "final").mkdir()
        shutil.copy(workspace / "model" / "config.json", tmp_path / name / "final")  # as Axolotl does
        run.save_model(str(tmp_path / name / "final"))
        with (tmp_path / name / "final" / "debug.log").open("w") as log:
            log.write("what a trainer goes on writing")
        (tmp_path / name / "final" / "checkpoint-3").mkdir()
        (tmp_path / name / "final" / "checkpoint-3" / "optimizer.pt").write_text("what may be deleted")
        weights.append(load_file(tmp_path / name / "final" / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    found, expected = (read_analysis(tmp_path / name) for name in ("with", "recipe"))
    assert found.keys() == expected.keys() and [r["step"] for r in found["confidence"]] == [0, 4, 8]
    for kind, records in expected.items():
        for ours, theirs in zip(found[kind], records, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert verify.main([str(tmp_path / "with" / "final"), "--rows", "2"]) == 0
    assert "was trained with the constraint 'pact'" in capsys.readouterr().out


REFUSED = {
    "no objective": ({"objective": None}, {}, "objective="),
    "an unknown key": ({"objective": {"lambda_k": 1}}, {}, "lambda_kl"),
    "a value out of range": ({"objective": {"lambda_kl": -1}}, {}, "lambda_kl"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
    "metrics of logits": ({}, {"compute_metrics": print}, "compute_metrics"),
    "no adapter": ({}, {"peft_config": None}, "peft_config"),
    "no such method": ({"objective": {"_component_": "pact_tune.objectives.pakt"}}, {}, "cannot be imported"),
    "an unknown key of the figures": ({"analysis": {"source": "x", "safety_tokens": "y", "row": 3}}, {}, "rows"),
    "an audit that is not there": ({"audit": {"file": "nowhere.jsonl"}}, {}, "does not exist"),
    "a lazy cache": ({"reference_cache": {"lazy": True}}, {}, "lazy"),
}


def penalised(context) -> Objective:
    return dataclasses.replace(sft(context), penalty=lambda module, weights: weights["lora_a.weight"].sum())


def test_a_method_that_needs_the_recipes_loop_is_refused(workspace, tmp_path):
    args = arguments(workspace, tmp_path)
    args.objective = {"_component_": "test_trl.penalised"}
    with pytest.raises(UserError, match="recipe's own loop"):
        trainer(workspace, args, peft_config=LoraConfig(**LORA))


def test_equal_rows_of_different_weights_are_refused(workspace, tmp_path):
    file = workspace / "rows.jsonl"
    mix = {"source": file, "fraction": 0.5, "ce_weight": 0}
    rows = chat_dataset(load_tokenizer(str(workspace / "model")), file, mix=mix, progress=False)
    with pytest.raises(UserError, match="twice with different weights, in '.*' and '.*ce_weight 0'"):
        trainer(workspace, arguments(workspace, tmp_path), train_dataset=rows, peft_config=LoraConfig(**LORA))


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(workspace, tmp_path, case):
    settings, more, words = REFUSED[case]
    args = arguments(workspace, tmp_path, **{key: value for key, value in settings.items() if key != "objective"})
    if "objective" in settings:
        given = settings["objective"]
        args.objective = None if given is None else {"safety_tokens": str(workspace / "safety_tokens"), **given}
    with pytest.raises(UserError) as error:
        trainer(workspace, args, **{"peft_config": LoraConfig(**LORA), **more})
    assert words in str(error.value) and "\n" not in str(error.value)
