"""Ratios of time: transformers' backbone to torchtune's, and TRL with the constraint (warm cache) to plain SFTTrainer.

    python -m benchmarks.backbones [--steps 20]

Both members of a pair run the same tiny Qwen2 on the same rows, in turns, in one process; the median of a step counts.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pact_tune.batching import collate
from pact_tune.conversations import load_tokenizer
from pact_tune.data import chat_rows
from pact_tune.decoder import Decoder
from pact_tune.demo import demo_family_path
from pact_tune.hf import PACTTrainer, PACTTrainingConfig, causal_lm
from pact_tune.hf.constraint import Constraint
from pact_tune.hf.decoder import HFDecoder
from pact_tune.objectives import Context, sft
from pact_tune.torchtune import from_checkpoint, lora
from pact_tune.torchtune.checkpoint import HFCheckpointer
from pact_tune.torchtune.decoder import TorchtuneDecoder

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
CPU = torch.device("cpu")


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def rows() -> list[dict[str, str]]:
    """Rows of about 60 tokens."""
    text = "What is the sum of these numbers, and how is it found? "
    return [{"prompt": f"{i}: {text}", "completion": f"It is {i}. {text}"} for i in range(64)]


def backbones(folder: Path, steps: int) -> float:
    """Time of a step of plain SFT with transformers, in times of torchtune's."""
    tokenizer = load_tokenizer(str(folder))
    batch = collate(chat_rows(tokenizer, rows(), "rows").conversations[:8], tokenizer.pad_token_id)
    objective = sft(Context(tokenizer, 0))
    theirs = from_checkpoint(str(folder), ["q_proj", "k_proj", "v_proj", "output_proj"], lora_rank=8, lora_alpha=16)
    set_trainable_params(theirs, get_adapter_params(theirs))
    base = HFCheckpointer(str(folder), "unused").load()
    lora.fill(theirs, base, lora.initial_adapter(theirs, base, 0), CPU)
    ours = causal_lm(str(folder), r=8, target_modules=MODULES).load(torch.float32, torch.float32, 0, CPU)
    decoders: list[Decoder] = [
        TorchtuneDecoder(theirs, tokenizer.pad_token_id, CPU),
        HFDecoder(ours, tokenizer.pad_token_id, CPU),
    ]
    seconds: list[list[float]] = [[], []]
    for _ in range(steps):
        for decoder, times in zip(decoders, seconds, strict=True):
            start = time.perf_counter()
            decoder.loss(batch, objective, {}, 1.0)[0].backward()
            times.append(time.perf_counter() - start)
    torchtune, transformers = map(statistics.median, seconds)
    return transformers / torchtune


def trainers(folder: Path, out: Path, steps: int) -> float:
    """Time of a step of TRL with PACT's tail preset and a warm cache, in times of plain SFTTrainer's."""
    tokenizer = load_tokenizer(str(folder))
    common: dict[str, Any] = {
        "per_device_train_batch_size": 8, "max_steps": steps, "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    columns = Dataset.from_dict(Constraint.columns(chat_rows(tokenizer, rows(), "rows")))
    objective = {"safety_tokens": str(demo_family_path() / "safety_tokens"), "preset": "tail", "k": 12}
    cache = {"directory": str(out / "cache")}

    def plain() -> SFTTrainer:
        return SFTTrainer(
            model(),
            SFTConfig(str(out), **common),
            train_dataset=columns,
            processing_class=tokenizer,
            peft_config=adapter(),
        )

    def constrained() -> SFTTrainer:
        args = PACTTrainingConfig(str(out), objective=objective, reference_cache=cache, **common)
        return PACTTrainer(model(), args, Dataset.from_list(rows()), processing_class=tokenizer, peft_config=adapter())

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def adapter() -> LoraConfig:
        return LoraConfig(r=8, target_modules=MODULES)

    seconds = [_timed(build) for build in (constrained, plain, constrained, plain)]  # the first fills the cache
    return statistics.median(seconds[2][1:]) / statistics.median(seconds[1][1:] + seconds[3][1:])


def _timed(build: Callable[[], SFTTrainer]) -> list[float]:
    trainer, clock = build(), Clock()
    trainer.add_callback(clock)
    trainer.train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    folder = demo_family_path() / "aligned"
    print(f"transformers / torchtune, a step of SFT: {backbones(folder, steps):.3f}")
    with tempfile.TemporaryDirectory() as out:
        print(
            f"TRL with the constraint (tail, warm cache) / plain SFTTrainer: {trainers(folder, Path(out), steps):.3f}"
        )


if __name__ == "__main__":
    main()
