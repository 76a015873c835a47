"""The recipe on published data with the tokenizers of Qwen2.5 and Llama 3.

Needs a folder that is not part of this repository, named by the environment variable PACT_TUNE_TEST_DATA:

    tokenizers/qwen2.5-hf, tokenizers/llama3-hf    tokenizers in Hugging Face format
    pact_official/SST2_5k_p_0.json                 5,000 rows of SST-2 (instruction, input, output)
    pact_official/agnews_5k_p_0.json               5,000 rows of AG News
    gsm8k/train.jsonl                              7,473 rows (question, answer)

The weights are random: two layers of each architecture, hidden size 256, the whole vocabulary.
"""

import math
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from recipe import logged, tune_run_processes
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from pact_tune import ReferenceCache, chat_dataset, load_tokenizer, safety_tokens_from_templates
from pact_tune.batching import collate, response_only_views
from pact_tune.conversations import response_only_prefix
from pact_tune.schedule import epoch_order, group_by_length

pytestmark = pytest.mark.skipif("PACT_TUNE_TEST_DATA" not in os.environ, reason="PACT_TUNE_TEST_DATA is not set")
DATA = Path(os.environ.get("PACT_TUNE_TEST_DATA", "."))
SOURCES = {
    "sst2": {"source": str(DATA / "pact_official" / "SST2_5k_p_0.json"), "rows": 5000},
    "gsm8k": {"source": str(DATA / "gsm8k" / "train.jsonl"), "rows": 7473},
}
LLAMA3_2_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {
    "qwen2.5": {
        "tokenizer": "qwen2.5-hf",
        "architecture": "qwen2",
        "vocab_size": 151936,  # the tokenizer has 151,665
        "rope": {"rope_type": "default", "rope_theta": 1e6},
        "eps": 1e-6,
    },
    "llama3.2": {
        "tokenizer": "llama3-hf",
        "architecture": "llama",
        "vocab_size": 128256,
        "rope": LLAMA3_2_ROPE,
        "eps": 1e-5,
    },
}
STEPS, BATCH = 20, 4


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory) -> Path:
    """A folder with model/, safety_tokens/ and config.yaml."""
    entry = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copytree(DATA / "tokenizers" / entry["tokenizer"], folder / "model", copy_function=shutil.copyfile)
    checkpoint = tiny_model(
        folder / "model",
        entry["architecture"],
        vocab_size=entry["vocab_size"],
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        max_position_embeddings=32768,
        initializer_range=0.05,
        rms_norm_eps=entry["eps"],
        rope_parameters=entry["rope"],
    )
    safety_tokens_from_templates(load_tokenizer(str(checkpoint))).save(folder / "safety_tokens")
    config = {
        "output_dir": "???",
        "checkpoint_dir": str(checkpoint),
        "model": {
            "_component_": "pact_tune.torchtune.from_checkpoint",
            "path": "${checkpoint_dir}",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": 8,
            "lora_alpha": 16,
        },
        "tokenizer": {"_component_": "pact_tune.load_tokenizer", "path": "${checkpoint_dir}"},
        "checkpointer": {
            "_component_": "pact_tune.torchtune.HFCheckpointer",
            "checkpoint_dir": "${checkpoint_dir}",
            "output_dir": "${output_dir}",
        },
        "dataset": {"_component_": "pact_tune.chat_dataset", "source": "???", "n": STEPS * BATCH, "max_seq_len": 1024},
        "loss": {
            "_component_": "pact_tune.objectives.pact",
            "safety_tokens": str(folder / "safety_tokens"),
            "preset": "paper",
        },
        "reference_cache": {"directory": "${output_dir}/cache", "dtype": "float32"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "batch_size": BATCH,
        "epochs": 1,
        "max_steps_per_epoch": STEPS,
        "save_adapter_weights_only": True,
        "device": "cpu",
        "dtype": "fp32",
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}/logs",
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_every_row_is_tokenized_and_counted(family):
    """All rows of both files."""
    tokenizer = load_tokenizer(str(family / "model"))
    end_of_turn = tokenizer.eos_token_id
    for name, entry in SOURCES.items():
        start = time.perf_counter()
        data = chat_dataset(tokenizer, entry["source"], max_seq_len=1024, progress=False)
        seconds = time.perf_counter() - start
        print(f"{family.name} {name}: {data.counts[0]} in {seconds:.1f} s")
        (counts,) = data.counts
        assert (counts.used, len(data)) == (entry["rows"], entry["rows"])
        assert counts.left_out == {}
        for conversation in data.conversations:
            ((start, end),) = conversation.responses
            assert 0 < start < end == len(conversation.tokens)
            assert conversation.tokens[-1] == end_of_turn and end_of_turn not in conversation.tokens[start : end - 1]
        lengths = [len(conversation.tokens) for conversation in data.conversations]
        limit = sorted(lengths)[len(lengths) // 2]
        (counts,) = chat_dataset(tokenizer, entry["source"], max_seq_len=limit, progress=False).counts
        assert counts.used == sum(length <= limit for length in lengths)
        assert counts.left_out["over max_seq_len"]["rows"] == entry["rows"] - counts.used > 0


def test_ag_news_has_one_response_only_view_a_label(family, tmp_path):
    """5,000 rows, four labels: what a fill would compute of that view."""
    tokenizer = load_tokenizer(str(family / "model"))
    source = str(DATA / "pact_official" / "agnews_5k_p_0.json")
    data = chat_dataset(tokenizer, source, max_seq_len=1024, progress=False)
    prefix = response_only_prefix(tokenizer, bos=False)
    views = [view for c in data.conversations for view in response_only_views(c, prefix, 64)]
    assert len(views) == 5000
    assert sum(map(len, ReferenceCache(tmp_path, {}).plan(views))) == 4


@pytest.mark.parametrize(("source", "preset"), [("sst2", "paper"), ("gsm8k", "tail")])
def test_one_and_two_processes_have_equal_losses(family, tmp_path, source, preset):
    """20 steps in fp32 at the same global batch; the first loss is also that of transformers."""
    seconds = {}
    for processes in (1, 2):
        start = time.perf_counter()
        result = tune_run_processes(
            family / "config.yaml",
            f"output_dir={tmp_path}/{processes}",
            f"dataset.source={SOURCES[source]['source']}",
            f"loss.preset={preset}",
            f"batch_size={BATCH // processes}",
            processes=processes,
        )
        seconds[processes] = time.perf_counter() - start
        assert result.returncode == 0, result.stderr
    one, two = ({name: logged(tmp_path / folder, name) for name in ("loss", "kl")} for folder in ("1", "2"))
    difference = max(abs(a - b) for a, b in zip(one["loss"], two["loss"], strict=True))
    print(
        f"{family.name} {source} {preset}: 1 process {seconds[1]:.0f} s, 2 processes {seconds[2]:.0f} s, "
        f"loss {one['loss'][0]:.4f} -> {one['loss'][-1]:.4f}, largest difference {difference:.1e}, "
        f"KL {one['kl'][0]:.2e} -> {one['kl'][-1]:.2e}"
    )
    assert len(one["loss"]) == STEPS and all(map(math.isfinite, one["loss"]))
    assert difference <= 1e-4
    assert one["loss"][-1] < one["loss"][0] - 0.1, "nothing was learned: equal losses would say little"
    # With the tail and random weights S holds little mass: the KL is small, and must agree all the same.
    assert max(one["kl"]) > 1e-6
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-2, abs=1e-7)

    tokenizer = load_tokenizer(str(family / "model"))
    rows = chat_dataset(
        tokenizer, SOURCES[source]["source"], n=STEPS * BATCH, max_seq_len=1024, progress=False
    ).conversations
    order = epoch_order(STEPS * BATCH, 0, 0, True)
    order = group_by_length(order, [len(row.tokens) for row in rows], BATCH, 0, 0)
    batch = collate([rows[i] for i in order[:BATCH]], tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_pretrained(family / "model")
    with torch.no_grad():
        logits = model(batch.tokens).logits.flatten(0, 1)[batch.index]
    expected = torch.nn.functional.cross_entropy(logits, batch.labels).item()
    assert logged(tmp_path / "1", "ce")[0] == pytest.approx(expected, abs=1e-4)
