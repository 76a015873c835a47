"""Models and exports against transformers and PEFT: the same weights give the same logits."""

import re
import shutil
import weakref

import peft
import pytest
import torch
from omegaconf import OmegaConf
from recipe import ARCHITECTURES, logged, logits_of, tune_run, tune_run_processes, write_workspace
from safetensors.torch import load_file, save_file
from torchao.dtypes.nf4tensor import to_nf4
from torchtune import config
from transformers import AutoConfig, AutoModelForCausalLM

from pact_tune import cli
from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.families import network_of
from pact_tune.reference.readings import Columns
from pact_tune.tools.configs import load
from pact_tune.torchtune import lora
from pact_tune.torchtune.checkpoint import HFCheckpointer
from pact_tune.torchtune.decoder import TorchtuneDecoder

TOLERANCE = {"atol": 1e-4, "rtol": 0}
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
TIED = ("qwen2", "llama3_2", "smollm2", "gemma2")


def workspace_of(folder, architecture, **model):
    """A workspace whose norms and biases are not the neutral ones of a fresh model, as in a trained one."""
    path = write_workspace(folder, architecture, rows=24, **model)
    file = folder / "model" / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    weights = load_file(file)
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            weights[name] = (tensor + 0.3 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
    save_file(weights, file, metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(scope="module")
def workspace(architecture, tmp_path_factory):
    return workspace_of(tmp_path_factory.mktemp(architecture), architecture)


@pytest.fixture(scope="module")
def reference(workspace):
    """The checkpoint in transformers; eager attention, which alone computes Gemma 2's soft-cap."""
    return transformers_model(workspace.parent / "model")


def transformers_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def build(workspace, model, trained):
    """A decoder with the checkpoint's weights and a LoRA that is fresh or, as if trained, anything."""
    cfg = load(workspace)
    network = config.instantiate(OmegaConf.merge(cfg.model, model))
    checkpointer = config.instantiate(cfg.checkpointer)
    base = checkpointer.load()
    adapter = lora.initial_adapter(network, base, 0)
    if trained:
        generator = torch.Generator().manual_seed(2)
        for name, tensor in adapter.items():
            noise = 0.1 * torch.randn(tensor.shape, generator=generator)
            adapter[name] = tensor * (1 + noise) if name.endswith(".magnitude") else noise
    checkpointer.check(network)
    lora.fill(network, base, adapter, torch.device("cpu"))
    return TorchtuneDecoder(network, 0, torch.device("cpu")), checkpointer, adapter


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 200, (2, 60), generator=torch.Generator().manual_seed(0))  # Gemma's window has 12


def test_logits_are_those_of_transformers_with_a_fresh_lora(workspace, reference, tokens):
    decoder, *_ = build(workspace, {}, trained=False)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(decoder, tokens), reference(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize("tail", [False, True])
def test_reference_columns_are_those_of_transformers_with_a_trained_lora(workspace, reference, tokens, tail):
    """Adapters off, read through the sliced head or, for the tail, the full one."""
    decoder, *_ = build(workspace, {}, trained=True)
    ids = torch.tensor([7, 3, 150])
    conversations = [Conversation(row.tolist(), [(20, 60)]) for row in tokens]
    columns = decoder.read_reference(conversations, Columns(ids, tail))
    with torch.no_grad():
        logits = reference(tokens).logits[:, 19:59].flatten(0, 1)
    torch.testing.assert_close(columns[:, :3], logits[:, ids], **TOLERANCE)
    if tail:
        rest = [i for i in range(logits.shape[1]) if i not in ids]
        torch.testing.assert_close(columns[:, 3], logits[:, rest].logsumexp(-1), **TOLERANCE)


def test_rows_behind_a_shared_prefix_are_computed_as_if_alone(architecture, workspace, tokens):
    """Once for all of them, longer together than any row may be; Gemma 2's caps and windows are computed row by row."""
    decoder, *_ = build(workspace, {"max_seq_len": 60}, trained=True)
    seen = []
    decoder.model.tok_embeddings.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel()))
    shared, rest = tokens[0, :40].tolist(), tokens[1].tolist()
    rows = [Conversation(shared + rest[i : i + 15 + i % 3], [(45, 55 + i % 3)]) for i in range(6)]
    reading = Columns(torch.tensor([7, 3, 150]), True)
    alone = torch.cat([decoder.read_reference([row], reading) for row in rows])
    seen.clear()
    torch.testing.assert_close(decoder.read_reference(rows, reading), alone, **TOLERANCE)
    assert seen == ([6 * 56] if architecture == "gemma2" else [40 + 6 * 14 + 2 * (0 + 1 + 2)])


CHOICES = {
    **{name: {"lora_attn_modules": [name], "apply_lora_to_mlp": False} for name in ATTENTION},
    "mlp": {"lora_attn_modules": ["v_proj"], "apply_lora_to_mlp": True},
    "output": {"lora_attn_modules": ["v_proj"], "apply_lora_to_mlp": False, "apply_lora_to_output": True},
    "all": {"lora_attn_modules": ATTENTION, "apply_lora_to_mlp": True},
}


def assert_exports_equal(decoder, checkpointer, adapter, workspace, tokens, tmp_path):
    """Trained torchtune model = merged checkpoint = PEFT adapter on the base, in transformers."""
    checkpointer.output_dir = tmp_path
    spec = lora.spec(decoder.model)
    folder = checkpointer.save("result", adapter, spec, {})
    live = logits_of(decoder, tokens)
    base_model = transformers_model(workspace.parent / "model")
    with torch.no_grad():
        assert (base_model(tokens).logits - live).abs().max() > 0.01, "the adapter does nothing"
        torch.testing.assert_close(transformers_model(folder)(tokens).logits, live, **TOLERANCE)
        adapted = peft.PeftModel.from_pretrained(base_model, folder / "adapter")
        torch.testing.assert_close(adapted(tokens).logits, live, **TOLERANCE)


@pytest.mark.parametrize("choice", CHOICES)
def test_exports_equal_the_trained_model(architecture, workspace, tokens, tmp_path, choice):
    model = CHOICES[choice]
    if choice == "output" and architecture in TIED:
        pytest.skip("a tied head takes no LoRA")
    if choice == "all" and architecture not in TIED:
        model = model | {"apply_lora_to_output": True}
    assert_exports_equal(*build(workspace, model, trained=True), workspace, tokens, tmp_path)


@pytest.fixture(scope="module")
def wide(architecture, tmp_path_factory):
    """Wide enough for NF4, whose scales are shared by 16384 weights."""
    if architecture == "smollm2":
        pytest.skip("its odd number of heads makes layers that NF4 does not divide")
    return workspace_of(
        tmp_path_factory.mktemp(f"wide_{architecture}"), architecture, width=256, initializer_range=0.05
    )


QLORA = {"lora_attn_modules": ATTENTION, "apply_lora_to_mlp": True, "quantize_base": True}


def dequantized_base(checkpointer, decoder, workspace):
    """The base in transformers with its weights rounded to NF4, as torchao does it, in torchtune's order of rows."""
    base = checkpointer.load()
    names = lora.quantized_names(decoder.model)
    rounded = {name: to_nf4(base[name].contiguous()).get_original_weight() for name in names}
    model = transformers_model(workspace.parent / "model")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in checkpointer.to_hf(rounded).items():
            parameters[name].copy_(weight)
    return model, names


def test_qlora_reference_and_exports_are_of_the_quantized_base(wide, tokens, tmp_path):
    decoder, checkpointer, adapter = build(wide, QLORA, trained=True)
    model, quantized = dequantized_base(checkpointer, decoder, wide)
    ids = torch.tensor([7, 3, 150])
    reference = decoder.read_reference([Conversation(tokens[0].tolist(), [(20, 60)])], Columns(ids, False))
    checkpointer.output_dir = tmp_path
    folder = checkpointer.save("result", adapter, lora.spec(decoder.model), {}, quantized)
    live = logits_of(decoder, tokens)
    with torch.no_grad():
        expected = model(tokens[:1]).logits[0, 19:59][:, ids]
        torch.testing.assert_close(reference, expected, **TOLERANCE)
        original = transformers_model(wide.parent / "model")(tokens[:1]).logits[0, 19:59][:, ids]
        assert (original - expected).abs().max() > 1e-2
        torch.testing.assert_close(transformers_model(folder)(tokens).logits, live, **TOLERANCE)
        adapted = peft.PeftModel.from_pretrained(model, folder / "adapter")
        torch.testing.assert_close(adapted(tokens).logits, live, **TOLERANCE)


def without_bias(architecture, **model):
    """LoRA on all layers that DoRA is right on: Qwen's query, key and value have a bias."""
    attention = ["output_proj"] if architecture.startswith("qwen") else ATTENTION
    return {"lora_attn_modules": attention, "apply_lora_to_mlp": True, "use_dora": True, **model}


def test_dora_exports_equal_the_trained_model(architecture, workspace, tokens, tmp_path):
    head = {} if architecture in TIED else {"apply_lora_to_output": True}
    decoder, *rest = build(workspace, without_bias(architecture, **head), trained=True)
    assert_exports_equal(decoder, *rest, workspace, tokens, tmp_path)


def test_fresh_dora_computes_the_base_model(architecture, workspace, reference, tokens):
    decoder, *_ = build(workspace, without_bias(architecture), trained=False)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(decoder, tokens), reference(tokens).logits, **TOLERANCE)


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name not in ("llama", "qwen2")], scope="module"
)
def test_three_steps_on_one_process_and_two(architecture, workspace, tmp_path, monkeypatch):
    """Equal losses and results; test_recipe.py does the same with the tied Qwen2."""
    steps = ["max_steps_per_epoch=3", "loss.preset=tail"]
    one = [f"output_dir={tmp_path}/one", *steps]
    assert tune_run(monkeypatch, workspace, *one) is None
    two = [f"output_dir={tmp_path}/two", f"reference_cache.directory={tmp_path}/cache", "batch_size=2", *steps]
    process = tune_run_processes(workspace, *two, processes=2)
    assert process.returncode == 0, process.stderr
    losses = logged(tmp_path / "one", "loss")
    assert len(losses) == 3 and logged(tmp_path / "two", "loss") == pytest.approx(losses, abs=1e-4)
    assert logged(tmp_path / "one", "kl")[0] == pytest.approx(0, abs=1e-5)  # B = 0: student = reference
    merged = [load_file(tmp_path / name / "epoch_0" / "model.safetensors") for name in ("one", "two")]
    for name in merged[0]:
        torch.testing.assert_close(merged[0][name], merged[1][name], atol=1e-3, rtol=1e-3)


VARIANTS = {"qlora": ["model.quantize_base=True"], "dora": ["model.use_dora=True"]}


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    return workspace_of(tmp_path_factory.mktemp("wide"), "llama3_1", width=256, initializer_range=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_on_one_process_and_two_resumed_and_verified(wide_llama, tmp_path, monkeypatch, variant):
    """Equal losses; a run that is cut off and resumed gives the same bits; `pact verify` agrees with the export."""
    common = ["epochs=2", "max_steps_per_epoch=3", "loss.preset=tail", *VARIANTS[variant]]
    assert tune_run(monkeypatch, wide_llama, f"output_dir={tmp_path}/one", *common) is None
    losses = logged(tmp_path / "one", "loss")
    assert logged(tmp_path / "one", "kl")[0] == pytest.approx(0, abs=1e-5)  # cached reference = live student
    assert cli.main(["verify", str(tmp_path / "one" / "epoch_1"), "--rows", "4"]) == 0
    assert cli.main(["verify", str(tmp_path / "one" / "epoch_1" / "adapter"), "--rows", "4"]) == 0

    save = HFCheckpointer.save
    with monkeypatch.context() as patch:

        def cut_off(self, name, *rest, **options):
            if name == "epoch_0":
                raise KeyboardInterrupt
            return save(self, name, *rest, **options)

        patch.setattr(HFCheckpointer, "save", cut_off)
        assert tune_run(monkeypatch, wide_llama, f"output_dir={tmp_path}/cut", *common) == 130
    again = [f"output_dir={tmp_path}/cut", *common, "resume_from_checkpoint=True"]
    assert tune_run(monkeypatch, wide_llama, *again) is None
    adapters = [load_file(tmp_path / n / "epoch_1" / "adapter" / "adapter_model.safetensors") for n in ("one", "cut")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])

    two = [f"output_dir={tmp_path}/two", f"reference_cache.directory={tmp_path}/cache", "batch_size=2", *common]
    process = tune_run_processes(wide_llama, *two, processes=2)
    assert process.returncode == 0, process.stderr
    assert logged(tmp_path / "two", "loss") == pytest.approx(losses, abs=1e-3)


REFUSED = {
    "DoRA on a bias": ("qwen2", 256, ["model.use_dora=True"], "which has a bias"),
    "NF4 of a narrow layer": ("llama", 32, ["model.quantize_base=True"], "multiples of 16384"),
    "rank 0": ("llama", 32, ["model.lora_rank=0"], "model.lora_rank is 0; it must be a whole number from 1"),
    "head of a tied model": ("qwen2", 32, ["model.apply_lora_to_output=True"], "head is its embedding (tied) and takes no LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_right_are_refused(tmp_path, monkeypatch, case):
    architecture, width, overrides, words = REFUSED[case]
    config = write_workspace(tmp_path, architecture, rows=4, width=width)
    message = tune_run(monkeypatch, config, f"output_dir={tmp_path}/out", *overrides)
    assert isinstance(message, str) and words in message and "\n" not in message.strip()


def test_nf4_that_cannot_be_divided_among_processes_is_refused(wide_llama):
    cfg = load(wide_llama, ["model.quantize_base=True"])
    with pytest.raises(UserError, match="among 4 process"), torch.device("meta"):
        lora.build(cfg.model, world_size=4)


def test_quantized_dora_on_several_processes_is_refused(wide_llama):
    cfg = load(wide_llama, ["model.quantize_base=True", "model.use_dora=True"])
    with pytest.raises(UserError, match="does not work on several processes"), torch.device("meta"):
        lora.build(cfg.model, world_size=2)


# --- what a checkpoint says of its network


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
THETA = {"rope_theta": 10000.0}
FACTOR_1 = {"rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip
SAME = {
    "keys left out": {"num_key_value_heads": None, "rope_theta": None},
    "transformers 4": {"rope_theta": 10000.0, "rope_scaling": None},
    "rope type default": {"rope_parameters": {"rope_type": "default", **THETA}},
    "llama3 with factor 1": {"rope_scaling": FACTOR_1, **THETA},
    "rope parameters with factor 1": {"rope_parameters": FACTOR_1 | THETA},
    "epsilon that was a float32": {"rms_norm_eps": 9.99999997e-07},
    "architecture instead of type": {"model_type": None, "architectures": ["LlamaForCausalLM"]},
}


@pytest.mark.parametrize("case", SAME)
def test_equal_networks_are_equal(case):
    changed = {key: value for key, value in (LLAMA | SAME[case]).items() if value is not None}
    assert network_of(changed, "here") == network_of(LLAMA, "here")


OTHER = {
    "activation": ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    "biases": ({"attention_bias": True}, "have biases"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, **THETA}, "rope_type is yarn"),
    "window": ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, "sliding window"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised already"),
    "Qwen3": ({"model_type": "qwen3"}, "pact_tune.hf.causal_lm"),
    "Gemma 3": ({"model_type": "gemma3_text"}, "pact_tune.hf.causal_lm"),
    "no type": ({"model_type": None}, "names no model_type"),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_networks_are_refused_with_the_route_that_knows_them(case):
    changes, words = OTHER[case]
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        network_of({key: value for key, value in (LLAMA | changes).items() if value is not None}, "here")
    assert "\n" not in str(caught.value)


def torchtune_section(network, **changes):
    sizes = {
        "vocab_size": network.vocab_size, "num_layers": network.num_layers, "num_heads": network.num_heads,
        "num_kv_heads": network.num_kv_heads, "embed_dim": network.dim, "intermediate_dim": network.intermediate_dim,
        "max_seq_len": network.max_seq_len, "norm_eps": network.norm_eps, "rope_base": network.rope_base,
    }  # fmt: skip
    lora_keys = {"lora_attn_modules": ["q_proj"], "lora_rank": 2, "lora_alpha": 4}
    return OmegaConf.create({"_component_": "torchtune.models.llama3.lora_llama3", **sizes, **lora_keys} | changes)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return workspace_of(tmp_path_factory.mktemp("llama_alone"), "llama")


BUILDERS = {
    "the right one": ({}, None),
    "llama3 scaling with factor 1": ({"_component_": "torchtune.models.llama3_1.lora_llama3_1", "scale_factor": 1}, None),
    "llama3 scaling": ({"_component_": "torchtune.models.llama3_1.lora_llama3_1"}, "rope_scaling is None in the checkpoint"),
    "two differences": ({"intermediate_dim": 48, "rope_base": 500000}, "rope_theta is 10000.0 in the checkpoint and 500000"),
    "a width": ({"intermediate_dim": 48}, "mlp.w1.weight is (64, 32) in the checkpoint and (48, 32) in the model"),
    "epsilon": ({"norm_eps": 1e-5}, "rms_norm_eps is 1e-06 in the checkpoint and 1e-05"),
}  # fmt: skip


@pytest.mark.parametrize("case", BUILDERS)
def test_torchtunes_own_builders_are_compared_with_the_checkpoint(llama, case):
    changes, words = BUILDERS[case]
    checkpointer = HFCheckpointer(str(llama.parent / "model"), "unused")
    model = lora.build(torchtune_section(checkpointer.network, **changes))
    if words is None:
        checkpointer.check(model)
    else:
        with pytest.raises(UserError, match=re.escape(words)):
            checkpointer.check(model)


def test_a_reference_with_attention_dropout_is_the_same_each_time(llama, tokens):
    checkpointer = HFCheckpointer(str(llama.parent / "model"), "unused")
    model = lora.build(torchtune_section(checkpointer.network, attn_dropout=0.5))
    base = checkpointer.load()
    lora.fill(model, base, lora.initial_adapter(model, base, 0), torch.device("cpu"))
    decoder = TorchtuneDecoder(model.train(), 0, torch.device("cpu"))
    reads = [
        decoder.read_reference([Conversation(tokens[0].tolist(), [(20, 60)])], Columns(torch.tensor([7, 3]), False))
        for _ in range(2)
    ]
    assert torch.equal(*reads)
    assert not torch.equal(logits_of(decoder, tokens), logits_of(decoder, tokens)), "the student has its dropout"


def damaged(workspace, folder, change):
    shutil.copytree(workspace.parent / "model", folder / "model")
    change(folder / "model")
    return folder / "model"


def other_head(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def same_head(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def binaries(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return workspace_of(tmp_path_factory.mktemp("tied"), "smollm2")


def test_a_tied_head_that_is_saved_again_is_taken_and_another_one_refused(tied, tmp_path):
    assert HFCheckpointer(str(damaged(tied, tmp_path / "same", same_head)), "unused").load().keys() == (
        HFCheckpointer(str(tied.parent / "model"), "unused").load().keys()
    )
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        HFCheckpointer(str(damaged(tied, tmp_path / "other", other_head)), "unused")


def test_bin_files_alone_say_how_to_convert_them(tied, tmp_path):
    with pytest.raises(UserError, match="has .bin files only: convert it with"):
        HFCheckpointer(str(damaged(tied, tmp_path, binaries)), "unused")


def test_loading_holds_one_whole_tensor_at_a_time(llama):
    checkpointer = HFCheckpointer(str(llama.parent / "model"), "unused")
    model = lora.build(torchtune_section(checkpointer.network))
    alive = []

    class Watched(dict):
        def __getitem__(self, name):
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = checkpointer.load()[name].clone()
            alive.append(weakref.ref(tensor))
            return tensor

    lora.fill(model, Watched(), lora.initial_adapter(model, {}, 0), torch.device("cpu"))
    assert len(alive) == len(checkpointer.load())


# --- the adapter's own precision


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return workspace_of(
        tmp_path_factory.mktemp("bf16"), "llama3_1", dtype="bfloat16", width=256, initializer_range=0.05
    )


STEP = ["dtype=bf16", "max_steps_per_epoch=3", "loss.preset=tail"]
KINDS = {"lora": [], "qlora": ["model.quantize_base=True"]}


def adapter_of(folder):
    return load_file(folder / "epoch_0" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_a_bf16_model_are_float32_on_one_process_and_two(bf16, tmp_path, monkeypatch, capsys, kind):
    """And `pact merge` gives the bits of the run's own merged model."""
    arguments = [*STEP, *KINDS[kind]]
    assert tune_run(monkeypatch, bf16, f"output_dir={tmp_path}/one", *arguments) is None
    two = [f"output_dir={tmp_path}/two", f"reference_cache.directory={tmp_path}/cache", "batch_size=2", *arguments]
    process = tune_run_processes(bf16, *two, processes=2)
    assert process.returncode == 0, process.stderr
    losses = logged(tmp_path / "one", "loss")
    assert logged(tmp_path / "one", "kl")[0] == pytest.approx(0, abs=1e-3)
    assert len(losses) == 3 and logged(tmp_path / "two", "loss") == pytest.approx(losses, abs=2e-2)
    assert {tensor.dtype for tensor in adapter_of(tmp_path / "two").values()} == {torch.float32}
    merged = load_file(tmp_path / "one" / "epoch_0" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert cli.main(["verify", str(tmp_path / "one" / "epoch_0"), "--rows", "2"]) == 0
    command = ["merge", str(tmp_path / "one" / "epoch_0" / "adapter"), "--output", str(tmp_path / "merged")]
    assert cli.main([*command, "--base", str(bf16.parent / "model")]) == 0
    again = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == again.keys() and all(torch.equal(merged[name], again[name]) for name in merged)
    transformers_model(tmp_path / "merged")
    assert cli.main(command) == 0  # a merge replaces an earlier one, and finds the base by its stamp
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert cli.main(command) == 1 and "notes.txt" in capsys.readouterr().err


def test_a_small_step_moves_a_float32_adapter_and_hardly_a_bf16_one(llama, tmp_path, monkeypatch):
    """The first step of Adam moves each weight by the learning rate."""
    moved = {}
    for dtype in ("fp32", "bf16"):
        weights = []
        for rate in ("1e-12", "3e-5"):
            out = f"output_dir={tmp_path}/{dtype}{rate}"
            arguments = [
                "dtype=bf16",
                f"adapter_dtype={dtype}",
                "max_steps_per_epoch=2",
                f"optimizer.lr={rate}",
                "save_adapter_weights_only=True",
            ]
            assert tune_run(monkeypatch, llama, out, *arguments) is None
            tensors = adapter_of(tmp_path / f"{dtype}{rate}")
            weights.append(torch.cat([t.flatten() for n, t in tensors.items() if "lora_A" in n]))
        moved[dtype] = (weights[0] != weights[1]).float().mean().item()
    assert moved["fp32"] > 0.95 and moved["bf16"] < 0.4


# --- pact merge, and going on from an adapter


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A family that torchtune does not know."""
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    folder = tmp_path_factory.mktemp("qwen3")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_merge_takes_an_adapter_of_peft_and_says_when_it_does_not_fit(request, bf16, tmp_path, tokens, capsys, family):
    folder = (
        request.getfixturevalue("qwen3") if family == "qwen3" else request.getfixturevalue("llama").parent / "model"
    )
    config = peft.LoraConfig(r=2, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(transformers_model(folder), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        adapted.save_pretrained(tmp_path / "adapter")
        expected = adapted(tokens).logits
    command = ["merge", str(tmp_path / "adapter"), "--output"]
    assert cli.main([*command, str(tmp_path / "merged"), "--base", str(folder)]) == 0
    with torch.no_grad():
        torch.testing.assert_close(transformers_model(tmp_path / "merged")(tokens).logits, expected, **TOLERANCE)
    capsys.readouterr()
    assert cli.main([*command, str(tmp_path / "other"), "--base", str(bf16.parent / "model")]) == 1
    message = capsys.readouterr().err
    assert "does not fit the model" in message and message.count("\n") == 1 and not (tmp_path / "other").exists()


def test_training_goes_on_from_an_adapter_that_the_reference_has_or_not(llama, tmp_path, monkeypatch):
    common = ["max_steps_per_epoch=2", "loss.preset=tail"]
    assert tune_run(monkeypatch, llama, f"output_dir={tmp_path}/first", *common, "epochs=3") is None
    first = tmp_path / "first" / "epoch_2"
    outside = [f"checkpointer.adapter={first}/adapter", "optimizer.lr=1e-12"]
    assert tune_run(monkeypatch, llama, f"output_dir={tmp_path}/outside", *common, *outside) is None
    inside = [f"checkpoint_dir={first}", "optimizer.lr=1e-12"]
    assert tune_run(monkeypatch, llama, f"output_dir={tmp_path}/inside", *common, *inside) is None
    assert logged(tmp_path / "outside", "ce") == pytest.approx(logged(tmp_path / "inside", "ce"), abs=1e-4)
    assert logged(tmp_path / "outside", "kl")[0] > 0.01 > 1e-4 > logged(tmp_path / "inside", "kl")[0]
    given, result = load_file(first / "adapter" / "adapter_model.safetensors"), adapter_of(tmp_path / "outside")
    assert all(torch.allclose(given[name], result[name], atol=1e-9) for name in given)
    other = [*outside, "model.lora_alpha=16"]
    message = tune_run(monkeypatch, llama, f"output_dir={tmp_path}/other", *common, *other)
    assert "model.lora_rank=4 model.lora_alpha=8" in message
