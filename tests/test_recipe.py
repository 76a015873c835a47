"""The recipe through the real `tune run`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from recipe import count_reference_rows, logged, logits_of, tune_run, tune_run_processes, write_rows, write_workspace
from safetensors.torch import load_file
from test_losses import naive_pact
from transformers import AutoModelForCausalLM

from pact_tune import PACTConfig, SafetyTokens, chat_dataset, cli, load_tokenizer
from pact_tune.batching import response_only_views
from pact_tune.conversations import response_only_prefix
from pact_tune.decoder import Decoder
from pact_tune.objectives import Context, pact


def adapter_of(output_dir, epoch=0) -> dict[str, torch.Tensor]:
    return load_file(Path(output_dir) / f"epoch_{epoch}" / "adapter" / "adapter_model.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_exports_are_the_model_that_was_trained(tmp_path, monkeypatch, architecture):
    """Two epochs; merged checkpoint = base + PEFT adapter in transformers, and the base weights have not moved."""
    config = write_workspace(tmp_path, architecture, rows=16)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    logits = []
    original = Decoder.loss

    def loss(self, batch, *rest):
        if len(logits) == 0 or logits[-1][0] is not batch:
            logits.append((batch, logits_of(self, batch.tokens)))
        return original(self, batch, *rest)

    monkeypatch.setattr(Decoder, "loss", loss)
    assert tune_run(monkeypatch, config, "epochs=2", "optimizer.lr=3e-2") is None
    out = tmp_path / "out"
    assert sorted(p.name for p in (out / "epoch_1").iterdir()) == sorted(
        ["adapter", "chat_template.jinja", "config.json",
         "generation_config.json", "model.safetensors", "pact.json", "tokenizer.json", "tokenizer_config.json"]
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = logits[0][0].tokens
    with torch.no_grad():
        # At the first step B = 0, so the trained network is the base model.
        torch.testing.assert_close(base(tokens).logits, logits[0][1], atol=1e-4, rtol=1e-4)
        for epoch in (0, 1):
            merged = AutoModelForCausalLM.from_pretrained(out / f"epoch_{epoch}")(tokens).logits
            clean = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
            adapted = peft.PeftModel.from_pretrained(clean, out / f"epoch_{epoch}" / "adapter")(tokens).logits
            torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
            assert (merged - logits[0][1]).abs().max() > 0.1
        # The first step of epoch 1 ran on the network as it was exported after epoch 0.
        batch, live = logits[len(logits) // 2]
        merged = AutoModelForCausalLM.from_pretrained(out / "epoch_0")(batch.tokens).logits
        torch.testing.assert_close(merged, live, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    stamp = json.loads((out / "epoch_1" / "pact.json").read_text())
    assert stamp["config"]["loss"]["preset"] == "paper" and stamp["steps"] == 8


@pytest.mark.parametrize("preset", ["paper", "official", "tail"])
def test_first_step_equals_the_equations_on_transformers_logits(workspace, tmp_path, monkeypatch, preset):
    """CE and KL of the first logged step, from a second, naive computation that shares no code with the recipe's."""
    weighting = "centred" if preset == "official" else "uniform"
    scored = SafetyTokens.load(workspace.parent / "safety_tokens")
    scores = torch.linspace(1.0, 0.1, len(scored))
    scored = SafetyTokens(
        scored.ids, scores, scores, scores, scored.candidates | {"scores": scores, "reference_probability": scores}, scored.provenance
    )  # fmt: skip
    scored.save(tmp_path / "tokens")
    arguments = [f"output_dir={tmp_path}/out", f"loss.safety_tokens={tmp_path}/tokens", f"loss.preset={preset}"]
    arguments += [f"loss.weighting={weighting}", "max_steps_per_epoch=1", "shuffle=False", "batch_by_length=False"]
    assert tune_run(monkeypatch, workspace, *arguments) is None

    model = AutoModelForCausalLM.from_pretrained(workspace.parent / "model")
    tokenizer = load_tokenizer(str(workspace.parent / "model"))
    config = PACTConfig.preset(preset, weighting=weighting, k=10)
    tokens = scored.select(10, config.ranking, weighting)
    prefix = response_only_prefix(tokenizer, config.response_only_bos)
    ce, kl = [], []
    for conversation in chat_dataset(tokenizer, str(workspace.parent / "rows.jsonl")).conversations[:4]:

        def columns(c):
            with torch.no_grad():
                (start, end), = c.responses  # fmt: skip
                logits = model(torch.tensor([c.tokens])).logits[0, start - 1 : end - 1].double()
            outside = torch.ones(logits.shape[1], dtype=torch.bool)
            outside[tokens.ids] = False
            tail = logits[:, outside].logsumexp(-1, keepdim=True)
            return logits, torch.cat([logits[:, tokens.ids], *([tail] if config.tail else [])], -1)

        logits, full = columns(conversation)
        (view,) = response_only_views(conversation, prefix, None)
        _, short = columns(view)
        start, end = conversation.responses[0]
        labels = torch.tensor(conversation.tokens[start:end])
        ce += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
        kl += naive_pact(
            full.tolist(), full.tolist(), short.tolist(), range(end - start), tokens.weights.tolist(), config
        )[0]
    assert logged(tmp_path / "out", "ce") == pytest.approx([sum(ce) / len(ce)], abs=1e-4)
    assert logged(tmp_path / "out", "kl") == pytest.approx([sum(kl) / len(kl)], abs=1e-4)


def test_lambda_zero_is_plain_sft_bit_for_bit(workspace, tmp_path, monkeypatch):
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/zero", "loss.lambda_kl=0") is None
    sft = [
        "~loss.safety_tokens",
        "~loss.preset",
        "~loss.weighting",
        "~loss.k",
        "loss._component_=pact_tune.objectives.sft",
    ]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/sft", *sft) is None
    assert_same_bits(adapter_of(tmp_path / "zero"), adapter_of(tmp_path / "sft"))
    assert logged(tmp_path / "zero", "kl") == []


def test_str_is_zero_at_first_and_then_holds_the_logits(workspace, tmp_path, monkeypatch):
    keep = ["~loss.preset", "~loss.weighting", "~loss.k", "loss._component_=pact_tune.objectives.str_"]
    for name, weight in (("loose", "1e-6"), ("tight", "10")):
        arguments = [f"output_dir={tmp_path}/{name}", f"loss.lambda_str={weight}", "epochs=2"]
        assert tune_run(monkeypatch, workspace, *arguments, *keep) is None
    assert logged(tmp_path / "loose", "str")[0] == pytest.approx(0.0, abs=1e-8)
    assert logged(tmp_path / "tight", "str")[-1] < 0.5 * logged(tmp_path / "loose", "str")[-1]


def test_cache_is_shared_and_gives_what_the_live_reference_gives(tmp_path, monkeypatch):
    config = write_workspace(tmp_path, rows=16)
    forwards = count_reference_rows(monkeypatch)
    assert tune_run(monkeypatch, config, f"output_dir={tmp_path}/first", "epochs=2") is None
    assert sum(forwards) == 16 + 16 + 8  # both views of 16 rows, once, for two epochs; and of 4 rows to check the cache
    forwards.clear()
    # another run, lambda and seed: nothing is computed
    changes = ["loss.lambda_kl=1", "seed=5", "loss.decay_start=4"]
    assert tune_run(monkeypatch, config, f"output_dir={tmp_path}/second", *changes) is None
    assert sum(forwards) == 8  # both views of the 4 rows that are checked
    assert tune_run(monkeypatch, config, f"output_dir={tmp_path}/live", "epochs=2", "reference_cache=null") is None
    half = ["epochs=2", "reference_cache.dtype=float16"]
    assert tune_run(monkeypatch, config, f"output_dir={tmp_path}/half", *half) is None
    for other, tolerance in (("live", 1e-5), ("half", 1e-3)):
        for metric in ("ce", "kl"):
            assert logged(tmp_path / "first", metric) == pytest.approx(
                logged(tmp_path / other, metric), rel=tolerance, abs=tolerance
            )


def test_accumulation_equals_a_larger_batch(workspace, tmp_path, monkeypatch):
    """40 rows do not fill the last step of 16; the rest is trained on all the same."""
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/one", "batch_size=16") is None
    split = ["batch_size=4", "gradient_accumulation_steps=4", "clip_grad_norm=1e9"]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/four", *split) is None
    assert len(logged(tmp_path / "one", "loss")) == 3
    assert logged(tmp_path / "one", "loss") == pytest.approx(logged(tmp_path / "four", "loss"), abs=1e-4)


def test_bf16_checkpointing_schedule_clipping_and_lora_dropout(workspace, tmp_path, monkeypatch):
    arguments = [
        f"output_dir={tmp_path}", "dtype=bf16", "enable_activation_checkpointing=True", "clip_grad_norm=1.0",
        "lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "lr_scheduler.num_warmup_steps=3", "model.lora_dropout=0.1", "loss.preset=tail", "log_every_n_steps=2",
    ]  # fmt: skip
    assert tune_run(monkeypatch, workspace, *arguments) is None
    losses = logged(tmp_path, "loss")
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert logged(tmp_path, "lr")[-1] < 1e-3 and max(logged(tmp_path, "grad_norm")) > 0


def test_two_processes_equal_one(tmp_path):
    """FSDP2 over gloo, the same global batches: equal losses over 20 steps, and the same exported model."""
    config = write_workspace(tmp_path, rows=80)
    one = tune_run_processes(config, f"output_dir={tmp_path}/one")
    assert one.returncode == 0, one.stderr
    two = tune_run_processes(
        config,
        f"output_dir={tmp_path}/two",
        "batch_size=2",
        f"reference_cache.directory={tmp_path}/cache2",
        processes=2,
    )
    assert two.returncode == 0, two.stderr
    losses = logged(tmp_path / "one", "loss")
    assert len(losses) == 20
    assert logged(tmp_path / "two", "loss") == pytest.approx(losses, abs=1e-4)
    merged = [load_file(tmp_path / name / "epoch_0" / "model.safetensors") for name in ("one", "two")]
    for name in merged[0]:
        torch.testing.assert_close(merged[0][name], merged[1][name], atol=1e-3, rtol=1e-3)
    machines = [
        json.loads((tmp_path / name / "epoch_0" / "pact.json").read_text())["machine"] for name in ("one", "two")
    ]
    assert machines == [{"device": "cpu", "processes": n, "torch": torch.__version__} for n in (1, 2)]


def start(config, *overrides) -> subprocess.Popen:
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "tune"), "run", "pact_lora_finetune", "--config", str(config), *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Killed twice: somewhere after the first saved state, and again after some more steps."""
    config = write_workspace(tmp_path, rows=400)
    common = ["save_every_n_steps=3", "model.lora_dropout=0.1", "epochs=2", "loss.preset=tail", "clip_grad_norm=1.0"]
    common += ["lr_scheduler._component_=torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup"]
    common += ["lr_scheduler.num_warmup_steps=3"]
    assert tune_run(monkeypatch, config, f"output_dir={tmp_path}/whole", *common) is None

    killed = [f"output_dir={tmp_path}/killed", *common]
    state = tmp_path / "killed" / "recipe_state.pt"
    for resume in ("False", "True"):
        last = state.stat().st_mtime_ns if state.exists() else 0
        process = start(config, *killed, f"resume_from_checkpoint={resume}")
        while not state.exists() or state.stat().st_mtime_ns == last:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (state.parent / ".epoch_0.0123456789abcdef.pact.partial").mkdir()  # as a kill during an export leaves it
    steps = torch.load(state, weights_only=True)["global_step"]
    assert 0 < steps < 200
    assert tune_run(monkeypatch, config, *killed, "resume_from_checkpoint=True") is None
    assert_same_bits(adapter_of(tmp_path / "whole", 1), adapter_of(tmp_path / "killed", 1))
    assert not list((tmp_path / "killed").glob(".*")), "a killed export or state was left behind"
    message = tune_run(monkeypatch, config, *killed, "resume_from_checkpoint=True")
    assert "complete" in message
    message = tune_run(monkeypatch, config, *killed, "resume_from_checkpoint=True", "batch_size=5")
    assert "rows per step" in message
    message = tune_run(monkeypatch, config, *killed, "resume_from_checkpoint=True", "loss.lambda_kl=1")
    assert "loss.lambda_kl was 3.0, now it is 1" in message


def test_mass_on_the_safety_tokens_is_reported_and_warned_of(workspace, tmp_path, monkeypatch, capsys):
    assert (
        tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/a", "loss.preset=tail", "max_steps_per_epoch=1")
        is None
    )
    out = capsys.readouterr().out
    assert "by response position: 0: 0.0" in out and "WARNING" not in out
    tokenizer = load_tokenizer(str(workspace.parent / "model"))
    from pact_tune.conversations import vocabulary_size
    from pact_tune.safety_tokens import safety_tokens_from_templates

    wide = safety_tokens_from_templates(tokenizer)
    ids = torch.arange(vocabulary_size(workspace.parent / "model") - 1)
    ones = torch.ones(len(ids))
    candidates = {"ids": ids, "scores": ones, "reference_probability": ones}
    SafetyTokens(ids, ones, ones, ones, candidates, wide.provenance).save(tmp_path / "wide")
    arguments = ["loss.preset=tail", "max_steps_per_epoch=1", f"loss.safety_tokens={tmp_path}/wide", "loss.k=null"]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/b", *arguments) is None
    assert "WARNING: more than half of the mass" in capsys.readouterr().out


def test_template_fallback_is_allowed_and_said(workspace, tmp_path, monkeypatch, capsys):
    arguments = ["loss.safety_tokens=qwen2.5-7b-instruct", "loss.template_fallback=True", "max_steps_per_epoch=1"]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}", *arguments) is None
    assert "these weights were not measured" in capsys.readouterr().out


def test_the_folder_of_the_tokens_may_have_any_name(workspace, tmp_path):
    shutil.copytree(workspace.parent / "safety_tokens", tmp_path / "{mine}")
    context = Context(load_tokenizer(str(workspace.parent / "model")), 1000)
    (said,) = pact(context, str(tmp_path / "{mine}")).notes
    assert "{mine}" in said and said.endswith("(templates).")


def foreign_tokens(workspace, folder, **provenance):
    tokens = SafetyTokens.load(workspace.parent / "safety_tokens")
    shift = provenance.pop("shift", 0)
    changed = SafetyTokens(
        tokens.ids + shift, tokens.weights, tokens.scores, tokens.reference_probability,
        {**tokens.candidates, "ids": tokens.candidates["ids"] + shift}, tokens.provenance | provenance, tokens.tokens,
    )  # fmt: skip
    changed.save(folder)
    return folder


BAD_INPUT = {
    "tokens of another tokenizer": (lambda w, d: [f"loss.safety_tokens={foreign_tokens(w, d / 't', tokenizer_fingerprint='0' * 32)}"], "made with tokenizer 00000000"),
    "ids past the vocabulary": (lambda w, d: [f"loss.safety_tokens={foreign_tokens(w, d / 't', shift=1000)}"], "past the model's vocabulary"),
    "no safety tokens there": (lambda w, d: [f"loss.safety_tokens={d}"], "holds no safety tokens"),
    "known name that nobody published": (lambda w, d: ["loss.safety_tokens=qwen2.5-7b-instruct"], "loss.template_fallback=True"),
    "empty data set": (lambda w, d: [f"dataset.source={write_rows(d / 'empty.jsonl', 0)}"], "holds no rows"),
    "no such data": (lambda w, d: ["dataset.source=nowhere.jsonl"], "does not exist"),
    "misspelt key": (lambda w, d: ["bacth_size=3"], "did you mean 'batch_size'"),
    "misspelt key in a section": (lambda w, d: ["optimizer.learning_rate=3"], "Unknown key 'learning_rate' in section 'optimizer'"),
    "misspelt key of the loss": (lambda w, d: ["loss.lamda_kl=3"], "did you mean 'lambda_kl'"),
    "misspelt key of the mix": (lambda w, d: ["dataset.mix.source=a.jsonl", "dataset.mix.fraction=0.1", "dataset.mix.spilt=x"], "did you mean 'split'"),
    "misspelt cache key": (lambda w, d: ["reference_cache.dir=x"], "did you mean 'directory'"),
    "unknown dtype of the cache": (lambda w, d: ["reference_cache.dtype=int8"], "must be one of: float16, float32"),
    "missing checkpoint": (lambda w, d: ["checkpoint_dir=/nowhere"], "'/nowhere'"),
    "wrong family": (lambda w, d: ["checkpointer.model_type=LLAMA3"], "holds a qwen2"),
    "no LoRA": (lambda w, d: ["model.lora_attn_modules=[]", "model.apply_lora_to_mlp=False"], "needs layers with an adapter"),
    "DoRA with a bias": (lambda w, d: ["model.use_dora=True"], "which has a bias"),
    "nothing to resume": (lambda w, d: ["resume_from_checkpoint=True"], "to resume from"),
    "no GPU": (lambda w, d: ["device=cuda"], "device: cuda is not available here: set device: cpu"),
    "fp16": (lambda w, d: ["dtype=fp16"], "must be one of: bf16, fp32"),
}  # fmt: skip


if torch.cuda.is_available():
    del BAD_INPUT["no GPU"]


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_before_training(workspace, tmp_path, monkeypatch, case):
    overrides, words = BAD_INPUT[case]
    message = tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/out", *overrides(workspace, tmp_path))
    assert isinstance(message, str) and words in message and "\n" not in message.strip()
    assert not list(tmp_path.glob("out/epoch_*")) and not list(tmp_path.glob("out/logs/*"))


def test_rows_without_response_are_counted_and_alone_are_an_error(workspace, tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": ""}\n{"instruction": "b", "output": "  "}\n')
    message = tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/out", f"dataset.source={rows}")
    assert "2 without a response" in message


def test_user_errors_end_real_processes_with_one_line(workspace, tmp_path):
    for command, processes in (("tune", 1), ("tune", 2), ("pact", 2)):
        words = [f"output_dir={tmp_path}", "bacth_size=3"]
        result = tune_run_processes(workspace, *words, processes=processes, command=command)
        assert result.returncode == 1
        assert result.stderr.count("did you mean 'batch_size'?") == 1
        assert "SIGTERM" not in result.stderr.split("FAILED")[-1]  # only the rank that says the error is reported
        if command == "pact":  # nothing of torchrun's report
            assert result.stderr.strip() == (
                "pact_lora_finetune: Unknown key 'bacth_size' in the config; did you mean 'batch_size'?"
            )
        # the last thing on the screen, also below what torchrun writes of a process that failed
        last = [line for line in result.stderr.splitlines() if line.strip("= ")][-1]
        assert "did you mean 'batch_size'?" in last


def test_config_names_are_found_from_any_folder_and_near_misses_named(tmp_path):
    result = tune_run_processes("demo/pact_laro", cwd=tmp_path)
    assert result.returncode != 0 and "did you mean 'demo/pact_lora'?" in result.stderr


def test_a_damaged_checkpoint_is_said_once(workspace, tmp_path, capsys):
    shutil.copytree(workspace.parent / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"a": ')
    assert cli.main(["validate", str(workspace), f"checkpoint_dir={tmp_path}/model"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"pact: '{tmp_path}/model/config.json' cannot be read") and error.count("\n") == 1
