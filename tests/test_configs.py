"""Every shipped config: complete, buildable, and of the very network that the published checkpoint holds."""

import json
import re
import sys

import pytest
import torch
from torchao.dtypes import nf4tensor
from transformers import AutoConfig, AutoModelForCausalLM

from pact_tune import cli, hub
from pact_tune.tools.configs import check, load, memory
from pact_tune.torchtune import lora
from pact_tune.torchtune.checkpoint import HFCheckpointer
from pact_tune.torchtune.config import config_names, find_config
from pact_tune.torchtune.memory import GIB

NAMES = [name for name in config_names() if not name.startswith("demo/")]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
# config.json of each published checkpoint: sizes in the order of SIZES, vocabulary, tied embeddings.
QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "use_sliding_window": False}
LLAMA = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
LLAMA_3_2 = LLAMA | {"rope_scaling": LLAMA["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True}
GEMMA = {
    "model_type": "gemma2", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "vocab_size": 256000, "head_dim": 256,
    "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096,
}  # fmt: skip
PUBLISHED = {
    "qwen2_5/0.5B": ((896, 24, 14, 2, 4864), QWEN | {"vocab_size": 151936, "tie_word_embeddings": True}),
    "qwen2_5/1.5B": ((1536, 28, 12, 2, 8960), QWEN | {"vocab_size": 151936, "tie_word_embeddings": True}),
    "qwen2_5/3B": ((2048, 36, 16, 2, 11008), QWEN | {"vocab_size": 151936, "tie_word_embeddings": True}),
    "qwen2_5/7B": ((3584, 28, 28, 4, 18944), QWEN | {"vocab_size": 152064, "tie_word_embeddings": False}),
    "qwen2_5/14B": ((5120, 48, 40, 8, 13824), QWEN | {"vocab_size": 152064, "tie_word_embeddings": False}),
    "qwen2_5/32B": ((5120, 64, 40, 8, 27648), QWEN | {"vocab_size": 152064, "tie_word_embeddings": False}),
    "llama3_1/8B": ((4096, 32, 32, 8, 14336), LLAMA | {"tie_word_embeddings": False}),
    "llama3_1/70B": ((8192, 80, 64, 8, 28672), LLAMA | {"tie_word_embeddings": False}),
    "llama3_2/1B": ((2048, 16, 32, 8, 8192), LLAMA_3_2 | {"head_dim": 64}),
    "llama3_2/3B": ((3072, 28, 24, 8, 8192), LLAMA_3_2 | {"head_dim": 128}),
    "llama3_3/70B": ((8192, 80, 64, 8, 28672), LLAMA | {"tie_word_embeddings": False}),
    "gemma2/2B": ((2304, 26, 8, 4, 9216), GEMMA),
    "gemma2/9B": ((3584, 42, 16, 8, 14336), GEMMA),
    "gemma2/27B": ((4608, 46, 32, 16, 36864), GEMMA | {"head_dim": 128, "query_pre_attn_scalar": 144}),
}  # fmt: skip


def published_weights(config: dict) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors on the meta device, as transformers names them."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


@pytest.fixture(autouse=True)
def nf4_once_a_shape(monkeypatch):
    """torchao takes some hundred small operations to quantise a weight on the meta device; a 70B model has 560."""
    quantized = {}

    def to_nf4(weight, **options):
        key = (tuple(weight.shape), weight.dtype)
        if not weight.is_meta or key not in quantized:
            quantized[key] = nf4tensor.to_nf4(weight, **options)
        return quantized[key]

    monkeypatch.setattr("torchtune.modules.peft.lora.to_nf4", to_nf4)
    monkeypatch.setattr("torchtune.modules.low_precision.nf4_linear.to_nf4", to_nf4)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_config_builds_and_fits_the_published_checkpoint(name, tmp_path):
    cfg = load(find_config(name))
    model = check(cfg)
    sizes, config = PUBLISHED[name.split("_pact")[0]]
    config = config | dict(zip(SIZES, sizes, strict=True))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    checkpointer = HFCheckpointer(str(tmp_path), cfg.checkpointer.model_type, str(tmp_path))
    base = checkpointer._to_tune(published_weights(config), **checkpointer._shape, **checkpointer._tied)
    adapter = {key: value for key, value in model.named_parameters() if ".lora_" in key}
    checkpointer.check(model, base | adapter)

    header = find_config(name).read_text().split("\n\n")[0]
    assert cfg.loss.safety_tokens in hub.KNOWN
    family = hub.KNOWN[cfg.loss.safety_tokens]
    assert f"tune download {family.aligned} --output-dir {cfg.checkpoint_dir}" in header
    command = (
        f"--aligned {family.aligned} --base {family.base} --prompts wildjailbreak --output {cfg.loss.safety_tokens}"
    )
    assert f"pact tokens compute {command}" in header and f"pact_lora_finetune --config {name}" in header
    estimates = [int(number) for number in re.findall(r"\d x (\d+) GiB", header)]
    for processes in {int(number) for number in re.findall(r"nproc_per_node (\d+)", header)}:
        lora._check(model, processes)
    assert estimates == [round(memory(cfg, model, processes) / GIB) for processes in (1, 2, 4, 8)]


def test_the_papers_settings_are_the_default_of_all_configs():
    assert {name.split("_pact")[0] for name in NAMES} == PUBLISHED.keys()
    for name in NAMES:
        cfg = load(find_config(name))
        assert (cfg.optimizer._component_, cfg.epochs, cfg.batch_size) == ("torch.optim.AdamW", 3, 2)
        assert (cfg.loss.preset, cfg.loss.k, cfg.loss.lambda_kl) == ("paper", 50, 3.0)
        if not name.endswith("_full"):
            assert (cfg.model.lora_rank, cfg.optimizer.lr, cfg.gradient_accumulation_steps) == (8, 3e-5, 1)
        for adapter in ("lora", "qlora"):
            assert f"{name.split('_pact')[0]}_pact_{adapter}" in NAMES


def test_pact_ls_cp_and_validate(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["ls"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in config_names()) and "pact_lora_finetune" in listed
    assert cli.main(["cp", "qwen2_5/0.5B_pact_lora", "mine"]) == 0
    assert (tmp_path / "mine.yaml").read_text() == find_config("qwen2_5/0.5B_pact_lora").read_text()
    (tmp_path / "mine.yaml").write_text("changed")
    assert cli.main(["cp", "qwen2_5/0.5B_pact_lora", "mine.yaml", "-n"]) == 0
    assert (tmp_path / "mine.yaml").read_text() == "changed"
    assert cli.main(["cp", "pact_lora_finetune", "new/recipe.py", "--make-parents"]) == 0
    assert "recipe_main" in (tmp_path / "new" / "recipe.py").read_text()
    assert cli.main(["cp", "pact_lora_finetune", "nowhere/recipe.py"]) == 1
    capsys.readouterr()
    assert cli.main(["cp", "qwen2_5/0.5B_pact_lora", "."]) == 0
    assert cli.main(["validate", "./0.5B_pact_lora.yaml", "device=cuda"]) == 0
    out = capsys.readouterr().out
    assert "494,032,768 parameters" not in out and "well-formed" in out and "estimated by formula" in out
    assert cli.main(["validate", "demo/pact_lora"]) == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["bacth_size=3"], "did you mean 'batch_size'"),
        (["model.lora_rank=0"], "lora_rank must be at least 1"),
        (["model.lora_attn_modules=[qproj]"], "did you mean 'q_proj'"),
        (["optimizer.lr=-1"], "Section 'optimizer' cannot be built"),
        (["loss.lambda_kl=-1"], "lambda_kl"),
        (["shuffle=False", "batch_by_length=True"], "shuffle: False keeps the order of the data"),
        (["output_dir=${nowhere}"], "nowhere"),
    ],
)  # fmt: skip
def test_pact_validate_says_what_is_wrong_in_one_sentence(capsys, overrides, words):
    assert cli.main(["validate", "demo/pact_lora", *overrides]) == 1
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "other", "words"),
    [
        ("  model_type: GEMMA2\n", "", "Section 'checkpointer' lacks the key 'model_type'"),
        ("pact_tune.torchtune.gemma2", "torchtune.models.gemma2", "soft-cap the hidden state"),
    ],
)
def test_pact_validate_of_an_edited_config(tmp_path, capsys, line, other, words):
    text = find_config("gemma2/2B_pact_lora").read_text()
    assert line in text
    (tmp_path / "mine.yaml").write_text(text.replace(line, other))
    assert cli.main(["validate", str(tmp_path / "mine.yaml")]) == 1
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_pact_validate_of_a_file_that_is_no_config(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("model: [\n")
    assert cli.main(["validate", str(tmp_path / "broken.yaml")]) == 1
    assert "not valid YAML" in capsys.readouterr().err
    assert cli.main(["validate", "qwen2_5/7B_pact_laro"]) == 1
    assert "did you mean 'qwen2_5/7B_pact_lora'" in capsys.readouterr().err


def test_pact_run_is_tune_run(monkeypatch):
    seen = []
    monkeypatch.setattr("torchtune._cli.tune.main", lambda: seen.extend(sys.argv))
    monkeypatch.setattr(sys, "argv", [])
    assert cli.main(["run", "pact_lora_finetune", "--config", "demo/pact_lora"]) == 0
    assert seen == ["tune", "run", "pact_lora_finetune", "--config", "demo/pact_lora"]
