"""`tune run` with a transformers model: exports, one process and two, resumption, what is refused."""

import json
import signal
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers.utils
import yaml
from recipe import logged, tune_run, tune_run_processes, write_rows, write_workspace
from safetensors.torch import load_file, save_file
from test_hf_decoder import ARCHITECTURES
from test_recipe import assert_same_bits, start
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from pact_tune import cli
from pact_tune.hf.backbone import transformers_sizes
from pact_tune.hf.decoder import HFDecoder
from pact_tune.tools import verify

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
# Beyond what transformers' defaults and tiny_model's sizes are.
KINDS = ARCHITECTURES | {
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "bloom": {"max_position_embeddings": None, "intermediate_size": None},  # knows no longest row
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},  # an attention of its own
}
FUSED = ["query_key_value", "dense"]
TARGETS = {"qwen3_moe": "all-linear", "phi3": ["qkv_proj", "o_proj"], "bloom": FUSED, "falcon": FUSED}


def write_hf(directory: Path, architecture: str = "qwen2", **model) -> Path:
    """A folder with checkpoint, rows and a config that trains it through transformers."""
    path = write_workspace(directory, rows=16)
    if architecture != "qwen2":
        replace_model(directory / "model", architecture)
    config = yaml.safe_load(path.read_text())
    del config["checkpointer"]
    config["model"] = {"_component_": "pact_tune.hf.causal_lm", "path": "${checkpoint_dir}", **LORA, **model}
    path.write_text(yaml.safe_dump(config))
    return path


def replace_model(folder: Path, architecture: str) -> None:
    """Another network in a checkpoint folder, with the tokenizer that lies there."""
    old = json.loads((folder / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "max_position_embeddings", "initializer_range", "eos_token_id", "pad_token_id")  # fmt: skip
    settings = {key: old[key] for key in sizes} | KINDS.get(architecture, {})
    config = AutoConfig.for_model(architecture, **{key: value for key, value in settings.items() if value is not None})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def replace_by_gemma3(folder: Path) -> None:
    """A Gemma 3 that sees images, too; its files name modules otherwise than transformers does."""
    old = json.loads((folder / "config.json").read_text())
    text = {key: old[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
                                      "num_attention_heads", "num_key_value_heads", "max_position_embeddings")}  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = AutoConfig.for_model("gemma3", text_config={**text, "sliding_window": 8, "initializer_range": 0.2, "pad_token_id": 0},
                                  vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4)  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def test_a_model_whose_files_name_modules_otherwise(tmp_path, monkeypatch, capsys):
    config = write_hf(tmp_path, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    replace_by_gemma3(tmp_path / "model")
    assert not any("model.language_model" in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    assert tune_run(monkeypatch, config, "optimizer.lr=3e-2", "epochs=2") is None
    result, tokens = tmp_path / "out" / "epoch_1", torch.arange(5, 17)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        before = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, result / "adapter")(input_ids=tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(result)(tokens).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert (merged - before).abs().max() > 1e-2
    for folder in (result, result / "adapter"):
        assert verify.main([str(folder), "--rows", "2"]) == 0
    assert cli.main(["merge", str(result / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == (result / "model.safetensors").read_bytes()


def adapter_of(out: Path, epoch: int = 0) -> dict[str, torch.Tensor]:
    return load_file(out / f"epoch_{epoch}" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return write_hf(tmp_path_factory.mktemp("hf"))


def assert_exports_are_equal(directory: Path, result: Path) -> None:
    """Merged checkpoint and adapter on the base are one model in transformers, and not the base."""
    tokens = torch.arange(5, 17)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(directory / "model")
        before = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, result / "adapter")(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(result)(tokens).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert (merged - before).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", KINDS)
def test_exports_reload_equal_and_are_verified(tmp_path, monkeypatch, architecture, capsys):
    targets = TARGETS.get(architecture, LORA["target_modules"])
    config = write_hf(tmp_path, architecture, target_modules=targets)
    assert tune_run(monkeypatch, config, "epochs=2", "optimizer.lr=3e-2", "loss.preset=tail") is None
    kl = logged(tmp_path / "out", "kl")
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 1e-3
    result = tmp_path / "out" / "epoch_1"
    assert_exports_are_equal(tmp_path, result)
    assert verify.main([str(result), "--rows", "2"]) == 0
    assert "was trained with the constraint 'pact'" in capsys.readouterr().out
    file = result / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(Exception, match="is not the file"):
        verify.main([str(result), "--rows", "2"])


def test_dora_also_on_layers_with_a_bias(workspace, tmp_path, monkeypatch):
    """A result reloads equal, its magnitudes have moved, and a run on two processes is one on one."""
    arguments = ["model.use_dora=True", "optimizer.lr=3e-2", "loss.preset=tail"]
    assert tune_run(monkeypatch, workspace, *arguments, f"output_dir={tmp_path}/one") is None
    assert_exports_are_equal(workspace.parent, tmp_path / "one" / "epoch_0")
    assert verify.main([str(tmp_path / "one" / "epoch_0"), "--rows", "2"]) == 0
    base = load_file(workspace.parent / "model" / "model.safetensors")
    prefix = "base_model.model."
    moved = 0.0
    for name, magnitude in adapter_of(tmp_path / "one").items():
        if name.endswith("lora_magnitude_vector"):
            weight = base[name.removeprefix(prefix).removesuffix("lora_magnitude_vector") + "weight"]
            moved = max(moved, (magnitude - weight.norm(dim=1)).abs().max().item())
    assert moved > 1e-3
    run = tune_run_processes(workspace, *arguments, f"output_dir={tmp_path}/two", "batch_size=2", processes=2)
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("ce", "kl"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), abs=1e-4)


def test_four_bits(workspace, tmp_path, monkeypatch):
    """The frozen weights are really in NF4, and so are the reference's: KL starts at zero."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = []
    original = HFDecoder.check_head

    def spied(self):
        quantized.extend(m for m in self.causal_lm.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
        return original(self)

    monkeypatch.setattr(HFDecoder, "check_head", spied)
    arguments = ["model.load_in_4bit=True", "save_adapter_weights_only=True", "loss.preset=tail", "optimizer.lr=3e-2"]
    assert tune_run(monkeypatch, workspace, *arguments, f"output_dir={tmp_path}/out", "epochs=2") is None
    assert len(quantized) == 14  # all linear layers of two blocks
    kl = logged(tmp_path / "out", "kl")
    assert kl[0] == pytest.approx(0, abs=1e-5) and kl[-1] > 1e-3
    whole = [*arguments[1:], f"output_dir={tmp_path}/whole", "epochs=2"]
    assert tune_run(monkeypatch, workspace, *whole) is None
    off = abs(logged(tmp_path / "whole", "ce")[0] - logged(tmp_path / "out", "ce")[0])
    assert 1e-4 < off < 0.5  # rounded, and nothing worse
    assert verify.main([str(tmp_path / "out" / "epoch_1"), "--rows", "2"]) == 0


def test_packing_what_does_not_keep_rows_apart_is_refused(tmp_path, monkeypatch):
    workspace = write_hf(tmp_path, "gpt_oss")
    refused = tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/out", "packed=True")
    assert "GptOssForCausalLM does not keep packed rows apart: train it without packing (packed=False;" in str(refused)
    assert not (tmp_path / "out").exists()
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/out", "epochs=1") is None


def test_two_processes_are_one(workspace, tmp_path):
    outs = []
    for processes in (1, 2):
        outs.append(tmp_path / str(processes))
        run = tune_run_processes(
            workspace,
            f"output_dir={outs[-1]}",
            f"batch_size={4 // processes}",
            "save_every_n_steps=2",
            processes=processes,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert ("2 processes: parameters are sharded" in run.stdout + run.stderr) == (processes == 2)
    for name in ("ce", "kl", "gate"):
        assert logged(outs[1], name) == pytest.approx(logged(outs[0], name), abs=1e-4)
    one, two = adapter_of(outs[0]), adapter_of(outs[1])
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-4)


def test_a_killed_run_resumes_to_the_same_bits(workspace, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "rows.jsonl", 100)
    arguments = [f"dataset.source={rows}", "epochs=2", "model.lora_dropout=0.2", "save_every_n_steps=3"]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/whole", *arguments) is None
    killed = [f"output_dir={tmp_path}/killed", *arguments]
    state = tmp_path / "killed" / "recipe_state.pt"
    process = start(workspace, *killed)
    while not state.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < torch.load(state, weights_only=True)["global_step"] < 50
    assert tune_run(monkeypatch, workspace, *killed, "resume_from_checkpoint=True") is None
    assert_same_bits(adapter_of(tmp_path / "killed", 1), adapter_of(tmp_path / "whole", 1))


def test_training_goes_on_from_an_adapter_and_the_reference_lacks_it(workspace, tmp_path, monkeypatch):
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/first", "optimizer.lr=3e-2") is None
    adapter = tmp_path / "first" / "epoch_0" / "adapter"
    arguments = [f"model.adapter={adapter}", "max_steps_per_epoch=1"]
    assert tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/second", *arguments) is None
    assert logged(tmp_path / "second", "kl")[0] > 1e-3
    assert "model.r=4" in tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/no", *arguments, "model.r=2")


def test_full_fine_tuning_is_saved_whole(workspace, tmp_path, monkeypatch):
    arguments = [
        "~model.r",
        "~model.target_modules",
        "~model.lora_alpha",
        "optimizer.lr=1e-3",
        f"output_dir={tmp_path}/out",
    ]
    assert tune_run(monkeypatch, workspace, *arguments) is None
    result = tmp_path / "out" / "epoch_0"
    assert verify.main([str(result), "--rows", "2"]) == 0
    assert sorted(load_file(result / "model.safetensors")) == sorted(
        load_file(workspace.parent / "model" / "model.safetensors")
    )


REFUSED = {
    "a section that nobody reads": (
        ["checkpointer={_component_: pact_tune.torchtune.HFCheckpointer, checkpoint_dir: a, output_dir: b}"],
        "remove the section 'checkpointer'",
    ),
    "a target that is not there": (["model.target_modules=[nowhere]"], "model.target_modules"),
    "a tied head": (["model.target_modules=[lm_head]"], "tied"),
    "four bits without bitsandbytes": (["model.load_in_4bit=True", "save_adapter_weights_only=True"], "bitsandbytes"),
    "an unknown key": (["model.lora_rank=4"], "lora_rank"),
    "no checkpoint": (["model.path=nowhere"], "no Hugging Face checkpoint"),
    "no adapter": (["model.r=null", "model.use_dora=True"], "set model.r"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_sentence(workspace, tmp_path, monkeypatch, case):
    overrides, expected = REFUSED[case]
    monkeypatch.setattr(transformers.utils, "is_bitsandbytes_available", lambda: False)
    message = tune_run(monkeypatch, workspace, f"output_dir={tmp_path}/out", *overrides)
    assert expected in message and message.count("\n") == 0
    assert not (tmp_path / "out" / "epoch_0").exists()


def test_layers_that_store_weights_transposed_are_refused(tmp_path, monkeypatch):
    workspace = write_hf(tmp_path, "gpt2", target_modules=["c_attn"])
    message = tune_run(monkeypatch, workspace)
    assert "gpt2 store their weights transposed" in message and "model.r=null" in message
    assert (
        tune_run(monkeypatch, workspace, "~model.r", "~model.target_modules", "~model.lora_alpha", "optimizer.lr=1e-3")
        is None
    )


@pytest.mark.parametrize("architecture", ["bloom", "falcon", "mpt", "xlstm", "gpt2", "gpt_oss", "llama"])
def test_sizes_for_the_estimate_of_memory(architecture):
    """Configs call them by names of their own, or not at all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture))
    sizes = transformers_sizes(model)
    assert sizes.inner >= model.config.get_text_config().hidden_size / 2 and sizes.layers >= 2 and sizes.layer > 0


def test_a_config_is_validated_without_weights(workspace, capsys):
    assert cli.main(["validate", str(workspace)]) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["asft", "safelora", "lisa", "sbr"])
def test_methods_that_ask_for_more_than_a_reading(workspace, tmp_path, monkeypatch, method):
    """Names and rows of weights, a last word on the adapter, a second stream: as torchtune's backbone gives them."""
    tiny_model(tmp_path / "base", seed=1)
    (tmp_path / "more.jsonl").write_text('{"prompt": "What is it?", "response": "I cannot help."}\n' * 2)
    settings = {
        "asft": [f"loss.base={tmp_path}/base"],
        "safelora": [f"loss.base={tmp_path}/base", "loss.number=1"],
        "lisa": [f"loss.alignment.source={tmp_path}/more.jsonl", "loss.k1=1", "loss.k2=2"],
        "sbr": [f"loss.prompts={tmp_path}/more.jsonl"],
    }[method]
    for run in (method, "sft"):
        overrides = [f"output_dir={tmp_path}/{run}", "optimizer.lr=1e-2"]
        overrides += settings if run == method else []
        assert tune_run(monkeypatch, workspace, "--method", run, *overrides) is None
    other, sft = adapter_of(tmp_path / method), adapter_of(tmp_path / "sft")
    changed = [name for name in sft if not torch.equal(sft[name], other[name])]
    if method == "safelora":
        assert len(changed) == 1 and changed[0].endswith("lora_B.weight")
    else:
        assert len(changed) == len(sft)
        assert max(logged(tmp_path / method, "sbr" if method == "sbr" else "penalty")) > 0


def test_a_models_own_code_never_runs(tmp_path, monkeypatch):
    """With a "y" on standard input, which transformers would take for leave."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config, model, ran = write_hf(tmp_path), tmp_path / "model", tmp_path / "ran"
    code = "from transformers import Qwen2Config\nopen({!r}, 'w')\nclass Own(Qwen2Config): model_type = 'own'\n"
    (model / "own.py").write_text(code.format(str(ran)))
    fields = json.loads((model / "config.json").read_text())
    fields |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (model / "config.json").write_text(json.dumps(fields))
    message = tune_run(monkeypatch, config)
    assert isinstance(message, str) and "code of its own" in message
    assert not ran.exists() and not list(tmp_path.glob("out/epoch_*"))
