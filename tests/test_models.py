"""Models and exports against transformers and PEFT: the same weights give the same logits."""

import peft
import pytest
import torch
from omegaconf import OmegaConf
from recipe import ARCHITECTURES, logged, logits_of, tune_run, tune_run_processes, write_workspace
from safetensors.torch import load_file, save_file
from torchao.dtypes.nf4tensor import to_nf4
from torchtune import config
from transformers import AutoModelForCausalLM

from pact_tune import cli
from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.reference.readings import Columns
from pact_tune.tools.configs import load
from pact_tune.torchtune import lora
from pact_tune.torchtune.checkpoint import HFCheckpointer
from pact_tune.torchtune.decoder import TorchtuneDecoder

TOLERANCE = {"atol": 1e-4, "rtol": 0}
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
TIED = ("qwen2", "llama3_2", "gemma2")


def workspace_of(folder, architecture, **model):
    """A workspace whose norms and biases are not the neutral ones of a fresh model, as in a trained one."""
    path = write_workspace(folder, architecture, rows=24, **model)
    file = folder / "model" / "model.safetensors"
    generator = torch.Generator().manual_seed(1)
    weights = load_file(file)
    for name, tensor in weights.items():
        if tensor.ndim == 1:
            weights[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
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
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def cut_off(self, name, *rest, **options):
            if name == "epoch_1":
                raise KeyboardInterrupt
            return save(self, name, *rest, **options)

        patch.setattr(HFCheckpointer, "save", cut_off)
        tune_run(monkeypatch, wide_llama, f"output_dir={tmp_path}/cut", *common)
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
    "rank 0": ("llama", 32, ["model.lora_rank=0"], "lora_rank must be at least 1"),
    "head of a tied model": ("qwen2", 32, ["model.apply_lora_to_output=True"], "incompatible with tie_word_embeddings"),
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
