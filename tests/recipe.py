"""Running the recipe as users do: through torchtune's own `tune run`, in this process or in several others."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from tiny import tiny_model

from pact_tune import load_tokenizer, safety_tokens_from_templates
from pact_tune.batching import Batch
from pact_tune.decoder import Decoder

AT_EXIT = Path(__file__).parent / "at_exit"  # aborts a process that shuts Python down while gloo's threads live
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA2 = {
    "sliding_window": 12,
    "query_pre_attn_scalar": 11,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}
# name -> arguments of tiny_model
ARCHITECTURES = {
    "qwen2": {"architecture": "qwen2", "tied": True},
    "qwen2_untied": {"architecture": "qwen2", "tied": False},
    "llama": {"architecture": "llama", "tied": False},
    "llama3_1": {"architecture": "llama", "tied": False, "rope_parameters": LLAMA3_SCALING},
    "llama3_2": {"architecture": "llama", "tied": True, "rope_parameters": LLAMA3_SCALING | {"factor": 32.0}},
    "smollm2": {"architecture": "llama", "tied": True, "num_attention_heads": 3, "num_key_value_heads": 1},
    "gemma2": {"architecture": "gemma2", "tied": True, **GEMMA2},
}


def write_rows(path: Path, n: int) -> Path:
    """n instruction rows of different lengths."""
    rows = [
        {
            "instruction": f"What is {i} plus {i % 7}?",
            "output": f"The answer is {i + i % 7}." + " It could be explained." * (i % 4),
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_workspace(directory: Path, architecture: str = "qwen2", rows: int = 40, width: int = 32, **model) -> Path:
    """A folder with a checkpoint, safety tokens, data and a config for them: config.yaml; NF4 needs a width of 256."""
    directory.mkdir(parents=True, exist_ok=True)
    tiny = ARCHITECTURES[architecture]
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
    if architecture == "smollm2":  # an odd number of heads, as in SmolLM2 135M
        sizes = {"hidden_size": 3 * width // 4, "intermediate_size": 2 * width, "head_dim": width // 4}
    checkpoint = tiny_model(directory / "model", **tiny | sizes | model)
    tokenizer = load_tokenizer(str(checkpoint))
    safety_tokens_from_templates(tokenizer).save(directory / "safety_tokens")
    write_rows(directory / "rows.jsonl", rows)
    config = {
        "output_dir": str(directory / "out"),
        "checkpoint_dir": str(checkpoint),
        "model": {
            "_component_": "pact_tune.torchtune.from_checkpoint",
            "path": "${checkpoint_dir}",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": 4,
            "lora_alpha": 8,
        },
        "tokenizer": {"_component_": "pact_tune.load_tokenizer", "path": "${checkpoint_dir}"},
        "checkpointer": {
            "_component_": "pact_tune.torchtune.HFCheckpointer",
            "checkpoint_dir": "${checkpoint_dir}",
            "output_dir": "${output_dir}",
        },
        "dataset": {"_component_": "pact_tune.chat_dataset", "source": str(directory / "rows.jsonl")},
        "loss": {
            "_component_": "pact_tune.objectives.pact",
            "safety_tokens": str(directory / "safety_tokens"),
            "preset": "paper",
            "weighting": "uniform",
            "k": 10,
        },
        "reference_cache": {"directory": str(directory / "cache"), "dtype": "float32"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2},
        "batch_size": 4,
        "epochs": 1,
        "device": "cpu",
        "dtype": "fp32",
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}/logs",
        },
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def full_finetuning() -> list[str]:
    """Overrides that take the adapters away."""
    keys = ("lora_attn_modules", "apply_lora_to_mlp", "lora_rank", "lora_alpha")
    return [*(f"~model.{key}" for key in keys), "optimizer.lr=1e-3"]


def tune_run(monkeypatch, config: Path | str, *overrides: str) -> int | str | None:
    """`tune run pact_lora_finetune --config CONFIG OVERRIDES` in this process; returns what it exits with."""
    argv = ["tune", "run", "pact_lora_finetune", "--config", str(config), *overrides]
    monkeypatch.setattr(sys, "argv", argv)
    try:
        runpy.run_module("torchtune._cli.tune", run_name="__main__")
    except SystemExit as end:
        return end.code
    return None


def run_command(config: Path | str, *overrides: str, processes: int = 1, command: str = "tune") -> list[str]:
    """The command line of `tune run`, or `pact run`; several processes go through torchrun and FSDP2."""
    launcher = ["--nproc_per_node", str(processes)] if processes > 1 else []
    return [
        str(Path(sys.executable).parent / command),
        "run",
        *launcher,
        "pact_lora_finetune",
        "--config",
        str(config),
        *overrides,
    ]


def tune_run_processes(
    config: Path | str, *overrides: str, processes: int = 1, cwd=None, command: str = "tune"
) -> subprocess.CompletedProcess:
    """The same in processes of its own."""
    return subprocess.run(
        run_command(config, *overrides, processes=processes, command=command),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(AT_EXIT)},
        timeout=600,
    )


def logged(output_dir: Path | str, name: str) -> list[float]:
    """One metric of a run, step by step, from torchtune's DiskLogger."""
    texts = [path.read_text() for path in sorted(Path(output_dir, "logs").glob("*.txt"))]
    return [float(value) for value in re.findall(rf"\b{name}:(\S+)", "".join(texts))]


def logits_of(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """What the network in training gives at every position: ``[B, S]`` to ``[B, S, V]``."""
    everywhere = torch.arange(tokens.numel())
    with torch.no_grad():
        batch = Batch(tokens, *[everywhere] * 6)
        return decoder.run(batch, lambda hidden, head: head.logits(hidden)).view(*tokens.shape, -1)


def count_reference_rows(monkeypatch) -> list[int]:
    """A list that grows by one number with each forward of the reference from now on: its conversations."""
    counts = []
    original = Decoder.read_reference

    def counted(self, conversations, reading):
        counts.append(len(conversations))
        return original(self, conversations, reading)

    monkeypatch.setattr(Decoder, "read_reference", counted)
    return counts
