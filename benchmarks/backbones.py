"""Transformers' backbone against torchtune's, and TRL with the constraint (warm cache) against plain SFTTrainer.

    python -m benchmarks.backbones [--rounds 9] [--shapes qwen2.5 llama]

Both members of a pair train the same random model of a published model's proportions on the same rows, on one thread, in
turns in one process; the ratio of their CPU times within a round counts. Peak memory is measured in a process of its own
for each.
"""

import argparse
import gc
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.step import _peak, _reset_peak, _resident
from pact_tune.batching import collate
from pact_tune.conversations import load_tokenizer
from pact_tune.data import ChatDataset, chat_rows
from pact_tune.decoder import Decoder
from pact_tune.demo import demo_family_path
from pact_tune.hf import PACTTrainer, PACTTrainingConfig, causal_lm
from pact_tune.hf.constraint import Constraint
from pact_tune.hf.decoder import HFDecoder
from pact_tune.objectives import Context, sft
from pact_tune.torchtune import from_checkpoint, lora
from pact_tune.torchtune.checkpoint import HFCheckpointer
from pact_tune.torchtune.decoder import TorchtuneDecoder

MODULES = ["q_proj", "v_proj"]  # the released code's
CPU = torch.device("cpu")
ROWS, STEPS = 2, 3  # rows of a step; steps of a trainer in a round, the first of which does not count
# Width, feed-forward and heads in the proportions of Qwen2.5-7B and Llama-3.1-8B, with fewer and narrower layers.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5": {"model_type": "qwen2", "hidden_size": 448, "intermediate_size": 2368, "num_attention_heads": 7,
                "num_key_value_heads": 1, "rope_theta": 1e6},
    "llama": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8,
              "num_key_value_heads": 2, "rope_theta": 5e5},
}  # fmt: skip
SHARED = {"num_hidden_layers": 12, "vocab_size": 8192, "tie_word_embeddings": False, "max_position_embeddings": 1024}


class Clock(TrainerCallback):
    """CPU seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.start)


def write_model(folder: Path, shape: str) -> Path:
    """A random model with the demo family's tokenizer."""
    tokenizer = load_tokenizer(str(demo_family_path() / "aligned"))
    tokenizer.model_max_length = SHARED["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = SHAPES[shape] | SHARED | ids
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def rows(tokenizer: Any) -> ChatDataset:
    """Rows of some 50 tokens of prompt and as many of response."""
    text = "What is the sum of these numbers, and how is it found? " * 2
    some = [{"prompt": f"{i}: {text}", "completion": f"It is {i}. {text}"} for i in range(ROWS * STEPS)]
    return chat_rows(tokenizer, some, "rows")


def backbone_step(name: str, folder: Path) -> Callable[[], None]:
    """Forward and backward of plain SFT with one backbone."""
    tokenizer = load_tokenizer(str(folder))
    batch = collate(rows(tokenizer).conversations[:ROWS], tokenizer.pad_token_id)
    objective = sft(Context(tokenizer, 0))
    decoder: Decoder
    if name == "torchtune":
        theirs = from_checkpoint(str(folder), MODULES, lora_rank=8, lora_alpha=16)
        set_trainable_params(theirs, get_adapter_params(theirs))
        base = HFCheckpointer(str(folder), "unused").load()
        lora.fill(theirs, base, lora.initial_adapter(theirs, base, 0), CPU)
        decoder = TorchtuneDecoder(theirs, tokenizer.pad_token_id, CPU)
    else:
        ours = causal_lm(str(folder), r=8, target_modules=MODULES).load(torch.float32, torch.float32, 0, CPU)
        decoder = HFDecoder(ours, tokenizer.pad_token_id, CPU)
    return lambda: decoder.loss(batch, objective, {}, 1.0)[0].backward()


def trainer(name: str, folder: Path, out: Path) -> SFTTrainer:
    """Plain SFTTrainer, or ours with the preset tail and a cache in ``out``."""
    tokenizer = load_tokenizer(str(folder))
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": ROWS, "max_steps": STEPS, "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shared: dict[str, Any] = {"processing_class": tokenizer, "peft_config": LoraConfig(r=8, target_modules=MODULES)}
    data = rows(tokenizer)
    if name == "plain":
        columns = Dataset.from_dict(Constraint.columns(data))
        return SFTTrainer(model, SFTConfig(str(out), **arguments), train_dataset=columns, **shared)
    objective = {"safety_tokens": str(demo_family_path() / "safety_tokens"), "preset": "tail", "k": 12}
    cache = {"directory": str(out / "cache")}
    settings = PACTTrainingConfig(str(out), objective=objective, reference_cache=cache, **arguments)
    return PACTTrainer(model, settings, data, **shared)


def trainer_step(name: str, folder: Path, out: Path) -> Callable[[], float]:
    """Trains anew for some steps, and gives the CPU time of the later ones."""

    def train() -> float:
        run, clock = trainer(name, folder, out), Clock()
        run.add_callback(clock)
        run.train()
        return statistics.median(clock.seconds[1:])

    return train


def timed(step: Callable[[], None]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.process_time()
        step()
        return time.process_time() - start

    return seconds


def compare(members: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Ratio of the second member to the first within each round, after a round that does not count."""
    ratios, times = [], []
    base, other = members
    for number in range(rounds + 1):
        found = {name: members[name]() for name in random.sample(list(members), 2)}
        if number:
            ratios.append(found[other] / found[base])
            times.append(found[base])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"rounds": rounds, "ratio": middle, "quartiles": [low, high], "seconds": statistics.median(times)}


def memory(name: str, folder: Path, out: Path) -> float:
    """MB that a step needs beyond the weights; to be run in a process of its own."""
    if name in ("torchtune", "transformers"):
        step = backbone_step(name, folder)
        work: Callable[[], Any] = step
    else:
        run = trainer(name, folder, out)
        work = run.train
    gc.collect()
    before = _resident("cpu")
    _reset_peak("cpu")
    work()
    return _peak("cpu") - before


def memory_in_a_process(name: str, folder: Path, out: Path) -> float:
    command = [sys.executable, "-m", "benchmarks.backbones", "--memory-of", name, str(folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        name, folder, out = args.memory_of
        print(memory(name, Path(folder), Path(out)))
        return
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, fp32, one thread")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as work:
            folder, out = write_model(Path(work) / "model", shape), Path(work)
            pairs: dict[str, dict[str, Callable[[], float]]] = {
                "transformers / torchtune": {n: timed(backbone_step(n, folder)) for n in ("torchtune", "transformers")},
                "A/A": {n: timed(backbone_step("torchtune", folder)) for n in ("torchtune", "again")},
                "TRL, constraint / plain": {n: trainer_step(n, folder, out) for n in ("plain", "constraint")},
            }
            for pair, members in pairs.items():
                print(json.dumps({"shape": shape, "pair": pair, **compare(members, args.rounds)}), flush=True)
            for name in ("torchtune", "transformers", "plain", "constraint"):
                megabytes = memory_in_a_process(name, folder, out)
                print(json.dumps({"shape": shape, "member": name, "MB beyond weights": round(megabytes)}), flush=True)


if __name__ == "__main__":
    main()
