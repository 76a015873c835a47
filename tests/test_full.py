"""Full fine-tuning: the reference comes from the cache, filled before the first step."""

import json
import shutil

import pytest
import torch
from recipe import full_finetuning, logged, logits_of, tune_run, tune_run_processes, write_workspace
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pact_tune import chat_dataset, cli, load_tokenizer
from pact_tune.decoder import Decoder
from pact_tune.torchtune.checkpoint import HFCheckpointer


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma2"])
def test_result_is_the_trained_model_and_the_reference_the_one_before(tmp_path, monkeypatch, architecture):
    config = write_workspace(tmp_path, architecture, rows=16)
    last = []
    original = Decoder.loss

    def loss(self, batch, *rest):
        last[:] = [self, batch]
        return original(self, batch, *rest)

    monkeypatch.setattr(Decoder, "loss", loss)
    arguments = [f"output_dir={tmp_path}/out", "loss.preset=tail", "epochs=2", *full_finetuning()]
    assert tune_run(monkeypatch, config, *arguments) is None
    kl = logged(tmp_path / "out", "kl")
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 1e-3
    assert logged(tmp_path / "out", "ce")[-1] < logged(tmp_path / "out", "ce")[0]
    result = tmp_path / "out" / "epoch_1"
    assert not (result / "adapter").exists()
    decoder, batch = last
    with torch.no_grad():
        live = logits_of(decoder, batch.tokens)
        model = AutoModelForCausalLM.from_pretrained(result, attn_implementation="eager")
        torch.testing.assert_close(model(batch.tokens).logits, live, atol=1e-4, rtol=0)
    base, tuned = load_file(tmp_path / "model" / "model.safetensors"), load_file(result / "model.safetensors")
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert moved == base.keys()  # the embedding, the head and all norms, too

    assert cli.main(["verify", str(result), "--rows", "4"]) == 0
    stamp = json.loads((result / "pact.json").read_text())
    (result / "pact.json").write_text(json.dumps(stamp | {"weights": "0" * 32}))
    assert cli.main(["verify", str(result), "--rows", "4"]) == 1


def test_gradient_of_all_weights_is_autograds(tmp_path, monkeypatch):
    """One SGD step against autograd on transformers: the loss's own gradient of the head is right, tied or not.

    By length, the loss is divided by the tokens of a mean step, otherwise by those of this one.
    """
    for architecture, by_length in (("qwen2", False), ("llama", True)):
        config = write_workspace(tmp_path / architecture, architecture, rows=8)
        out = tmp_path / architecture / "out"
        overrides = [f"output_dir={out}", *full_finetuning(), "optimizer._component_=torch.optim.SGD"]
        overrides += [
            "optimizer.lr=0.1",
            "loss.lambda_kl=0",
            "max_steps_per_epoch=1",
            "batch_size=2",
            f"batch_by_length={by_length}",
        ]
        batches = []
        original = Decoder.loss

        def loss(self, batch, *rest, original=original, batches=batches):
            batches.append(batch)
            return original(self, batch, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "loss", loss)
            assert tune_run(monkeypatch, config, *overrides) is None
        (batch,) = batches
        model = AutoModelForCausalLM.from_pretrained(tmp_path / architecture / "model")
        logits = model(batch.tokens).logits.flatten(0, 1)[batch.index]
        tokenizer = load_tokenizer(str(tmp_path / architecture / "model"))
        rows = chat_dataset(tokenizer, str(tmp_path / architecture / "rows.jsonl")).conversations
        mean_step = sum(c.num_response_tokens for c in rows) / 4  # steps of 2 rows
        assert abs(mean_step / len(batch.labels) - 1) > 0.1
        divisor = mean_step if by_length else len(batch.labels)
        (torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / divisor).backward()
        tuned = load_file(out / "epoch_0" / "model.safetensors")
        for name, parameter in model.named_parameters():
            expected = parameter.detach() - 0.1 * parameter.grad
            torch.testing.assert_close(tuned[name], expected, atol=1e-5, rtol=1e-4)


def test_two_processes_equal_one_and_resume_to_the_same_bits(tmp_path, monkeypatch):
    config = write_workspace(tmp_path, "qwen2_untied", rows=16)
    common = ["epochs=2", "loss.preset=tail", *full_finetuning()]
    assert tune_run(monkeypatch, config, f"output_dir={tmp_path}/one", *common) is None
    save = HFCheckpointer.save

    def cut_off(self, name, *rest, **options):
        if name == "epoch_0":
            raise KeyboardInterrupt
        return save(self, name, *rest, **options)

    # An empty cache on resuming: the reference is computed again, from the weights before the first step.
    for cache, patch_name in (("a", cut_off), ("b", save)):
        monkeypatch.setattr(HFCheckpointer, "save", patch_name)
        arguments = [f"output_dir={tmp_path}/cut", f"reference_cache.directory={tmp_path}/{cache}", *common]
        if cache == "a":
            assert tune_run(monkeypatch, config, *arguments) == 130
            (tmp_path / "cut_two").mkdir()
            shutil.copy(tmp_path / "cut" / "recipe_state.pt", tmp_path / "cut_two")
        else:
            assert tune_run(monkeypatch, config, *arguments, "resume_from_checkpoint=True") is None
    one, cut = (load_file(tmp_path / name / "epoch_1" / "model.safetensors") for name in ("one", "cut"))
    assert all(torch.equal(one[name], cut[name]) for name in one)

    two = [f"output_dir={tmp_path}/two", f"reference_cache.directory={tmp_path}/c", "batch_size=2", *common]
    process = tune_run_processes(config, *two, processes=2)
    assert process.returncode == 0, process.stderr
    losses = logged(tmp_path / "one", "loss")
    assert logged(tmp_path / "two", "loss") == pytest.approx(losses, abs=1e-3)
    # the state of one process, resumed on two
    again = [f"output_dir={tmp_path}/cut_two", "batch_size=2", *common, "resume_from_checkpoint=True"]
    process = tune_run_processes(config, *again, processes=2)
    assert process.returncode == 0, process.stderr
    assert logged(tmp_path / "cut_two", "loss") == pytest.approx(losses[4:], abs=1e-3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("reference_cache=null", "must be stored before the first step"),
        ("reference_cache.lazy=True", "with lazy: False"),
        ("save_adapter_weights_only=True", "an adapter"),
    ],
)
def test_full_finetuning_without_what_it_needs_is_refused(tmp_path, monkeypatch, override, words):
    config = write_workspace(tmp_path, rows=4)
    message = tune_run(monkeypatch, config, f"output_dir={tmp_path}/out", override, *full_finetuning())
    assert isinstance(message, str) and words in message
