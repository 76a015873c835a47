"""Everything that wants a GPU, in one script that begins nothing after nine minutes, without a network.

    python -m benchmarks.gpu --output DIR                          on a GPU
    python -m benchmarks.gpu --output DIR --device cpu --tiny      every line of it on a CPU

Two parts, each of which writes its CSV into the folder as it goes, so that a run that is cut keeps what it has:

    checks.csv    losses, cache, exports and the rest of what a run leaves, on the device against the CPU
    steps.csv     a step at true size, of everyone who makes it: time, weights, peak memory; and the filling of the cache

`--story FILE` runs an experiment (docs/experiments.md), three seeds, in the time that is left, `--jobs` runs at a time, and keeps
what it has where the file says; a file whose config has `device: auto`, such as smollm2_quick, trains on the GPU.
What cannot be run fails, by name, and the rest goes on; the exit code is then 1. docs/performance.md says how to carry it to
a machine without a network.
"""

import argparse
import contextlib
import csv
import dataclasses
import gc
import importlib.metadata
import itertools
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Distribution and the version that it must have (None: any).
NEEDED = {
    "torch": None, "transformers": None, "torchtune": "0.6.1", "torchao": "0.15.0", "peft": None, "trl": None,
    "accelerate": None, "omegaconf": None, "pydantic": None, "datasets": None, "safetensors": None, "tokenizers": None,
    "jinja2": None, "tqdm": None, "torchdata": None, "tiktoken": None, "sentencepiece": None, "psutil": None,
}  # fmt: skip
PARTS = ("checks", "steps")


class Table:
    """A CSV file that grows by a line as soon as a result is there, and what has failed so far.

    Args:
        path (Path): an older one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed: list[str] = []
        self.columns: list[str] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes and prints one line; the first gives the columns."""
        new = not self.columns
        self.columns = self.columns or list(row)
        with self.path.open("w" if new else "a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print("  ".join(str(value) for value in row.values()), flush=True)

    def attempt(self, name: str, deadline: float, work: Callable[[], None]) -> None:
        """Does some work; what goes wrong is printed and remembered, and nothing is begun after the deadline."""
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("no time was left for it")
            work()
        except Exception as error:
            traceback.print_exc()
            message = str(error).splitlines()[0] if str(error) else ""
            self.failed.append(f"{name}: {type(error).__name__} {message}")


def missing() -> list[str]:
    """What is not installed, or in another version than was tested."""
    found = {}
    for name in NEEDED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    print("Installed: " + ", ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    absent = [f"{name}=={version}" if version else name for name, version in NEEDED.items() if name not in found]
    other = [
        f"{name}=={version} (there is {found[name]})"
        for name, version in NEEDED.items()
        if version and found.get(name, version).split("+")[0] != version
    ]
    return absent + other


# Checks: a short run on the device against the same on the CPU ----------------------------------------------------------

# How far a run may differ from the one on the CPU: losses (relative) and the reference's probabilities; the trained model, in
# parts of how far training moved it.
FLOAT32, BFLOAT16 = (2e-3, 0.05), (0.05, 0.5)
LEAST_MOVE = 0.02  # of a probability: less, and the trained model would say nothing
BACKBONES = {
    "torchtune": [],
    "transformers": [
        "~checkpointer", "model._component_=pact_tune.hf.causal_lm", "~model.lora_attn_modules", "~model.apply_lora_to_mlp",
        "~model.lora_rank", "~model.lora_alpha", "~model.lora_dropout", "model.r=8", "model.lora_alpha=16",
        "model.target_modules=[q_proj,k_proj,v_proj,o_proj]",
    ],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that a device may get wrong.

    Attributes:
        name (str): for people.
        here (list[str]): overrides of the run on the device.
        there (list[str]): of the run on the CPU that it is held against.
        tolerance (tuple[float, float]): see :data:`FLOAT32`.
        backbones (tuple[str, ...]): on which it is run.
        method (tuple[str, ...]): overlays of both; of PACT alone the reference is compared as well.
    """

    name: str
    here: tuple[str, ...] = ()
    there: tuple[str, ...] = ()
    tolerance: tuple[float, float] = FLOAT32
    backbones: tuple[str, ...] = tuple(BACKBONES)
    method: tuple[str, ...] = ()


NF4 = ("model.quantize_base=True",)
TAIL = ("loss.preset=tail",)
LIVE = "reference_cache=null"
METHODS = {  # overlay -> overrides
    "str": ("loss.safety_tokens=${demo:safety_tokens}",),
    "constrained_sft": (),
    "anchored_sft": (),
    "full_kl": (),
    "asft": (),
    "safelora": ("loss.number=2",),
    "lisa": ("loss.k1=1", "loss.k2=1", "loss.alignment.source=${dataset.source}"),
    "sbr": ("loss.prompts=${demo:data/identification.jsonl}",),
    "pact_tail": ("loss.direction=reverse",),
}
CHECKS = (
    Check("float32"),
    Check("tail", TAIL, TAIL),
    Check("fused AdamW", ("optimizer.fused=True",)),
    Check("packed", ("packed=True",)),
    Check("reference in every step", (LIVE,)),
    Check("activation checkpointing", ("enable_activation_checkpointing=True",)),
    Check("compile", ("compile=True",), backbones=("torchtune",)),
    Check("NF4", NF4, NF4, backbones=("torchtune",)),
    Check("bfloat16", ("dtype=bf16",), tolerance=BFLOAT16),
    *(Check(f"method {name}", more, more, backbones=("torchtune",), method=(name,)) for name, more in METHODS.items()),
)


@dataclasses.dataclass
class Outcome:
    """What a short run leaves. Probabilities lie on the CPU.

    Attributes:
        loss (torch.Tensor): of each step.
        before (torch.Tensor): next-token probabilities of the network before the first step.
        trained (torch.Tensor): the same after the last.
        exports (dict[str, torch.Tensor]): the same of what was saved, as transformers and PEFT read it.
        reference (torch.Tensor | None): the reference of some rows as steps read it, over the safety tokens.
        alone (torch.Tensor | None): the same computed live, row by row.
    """

    loss: Any
    before: Any
    trained: Any
    exports: dict[str, Any]
    reference: Any
    alone: Any

    @property
    def moved(self) -> float:
        """How far training moved a probability, at most."""
        return largest(self.trained, self.before)


def write_inputs(folder: Path, rows: int) -> list[str]:
    """A random checkpoint in float32, wide enough for NF4, and a base of it, with the demo's tokenizer; some of its rows.

    Returns:
        list[str]: overrides of the demo's config that name them.
    """
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from pact_tune.demo import demo_family_path

    demo = demo_family_path()
    tokenizer = AutoTokenizer.from_pretrained(demo / "aligned")
    tokenizer.save_pretrained(folder / "model")
    network = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.08, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    for seed, name in enumerate(("model", "base")):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(network).save_pretrained(folder / name)
    lines = (demo / "data" / "task.jsonl").read_text().splitlines(keepends=True)[:rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    return [
        f"checkpoint_dir={folder / 'model'}",
        f"base_dir={folder / 'base'}",
        f"dataset.source={folder / 'rows.jsonl'}",
        "~dataset.mix",
        f"dataset.n={rows}",
    ]


def short_run(
    folder: Path, device: str, steps: int, overrides: Sequence[str], method: Sequence[str], reads_exports: bool
) -> Outcome:
    """A few steps of the recipe, and what they leave."""
    import pact_lora_finetune
    import torch

    from pact_tune.batching import Batch, collate
    from pact_tune.tools.configs import load

    losses: list[float] = []

    class Recipe(pact_lora_finetune.PACTLoRAFinetuneRecipe):
        def _log(self) -> str:
            text = super()._log()
            losses.append(self.final["loss"])
            return text

    size = ["batch_size=6", "epochs=1", f"max_steps_per_epoch={steps}", "log_every_n_steps=1"]
    size += ["optimizer.lr=1e-2", "lr_scheduler=null"]  # so few steps must move it far enough
    exact = [] if LIVE in overrides else ["reference_cache.dtype=float32"]
    cfg = load("demo/pact_lora", [f"output_dir={folder}", f"device={device}", *size, *exact, *overrides], method)
    recipe = Recipe(cfg)
    recipe.setup(cfg)
    numbers = [row for step in recipe.schedule.epoch(0)[:steps] for row in step][:6]
    tokens = collate([recipe.rows[row] for row in numbers], 0).tokens
    batch = Batch(tokens.to(device), *[torch.arange(tokens.numel(), device=device)] * 6)

    def student() -> torch.Tensor:
        with torch.no_grad():
            logits = recipe.decoder.run(batch, lambda hidden, head: head.logits(hidden))
        return probabilities(logits.view(*tokens.shape, -1))

    before = student()
    recipe.train()
    recipe.cleanup()
    reference = alone = None
    if not method:
        read = recipe.decoder.read_reference
        alone = probabilities(torch.cat([read([recipe.rows[row]], recipe.objective.reading) for row in numbers]))
        reference = probabilities(recipe.reference.read(numbers)["full"])
    exports: dict[str, Any] = {}
    if reads_exports:
        exports = read_exports(folder / "epoch_0", cfg.checkpoint_dir, tokens, quantized=set(NF4) <= set(overrides))
    return Outcome(torch.tensor(losses), before, student(), exports, reference, alone)


def probabilities(logits: Any) -> Any:
    """Softmax in float32, on the CPU."""
    return logits.detach().float().softmax(-1).cpu()


def read_exports(result: Path, base: str, tokens: Any, quantized: bool) -> dict[str, Any]:
    """Next-token probabilities of a result in transformers: the merged checkpoint, and the adapter on its base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    models = {"merged checkpoint": AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32)}
    if not quantized:  # its base exists nowhere but in the run
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        models["PEFT adapter"] = PeftModel.from_pretrained(model, result / "adapter")
    with torch.no_grad():
        return {name: probabilities(model(tokens).logits) for name, model in models.items()}


def largest(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


def differences(here: Outcome, there: Outcome, tolerance: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """How far a run on the device is from the one on the CPU, and how far it may be.

    What it saved is compared with what it trained, or, where a method changes that at the end, with what the other saved.
    """
    numbers, model = tolerance
    found = {
        "loss": (largest(here.loss / there.loss, 1.0), numbers),
        "trained model": (largest(here.trained, there.trained) / there.moved, model),
        **{
            name: (largest(export, there.exports.get(name, here.trained)) / there.moved, model)
            for name, export in here.exports.items()
        },
    }
    if here.reference is not None:
        found["reference"] = largest(here.reference, there.reference), numbers
        found["reference, stored and live"] = largest(here.reference, here.alone), numbers
    return found


def run_checks(table: Table, options: argparse.Namespace, deadline: float) -> None:
    """Every check on every backbone; a run on the CPU serves all that are held against the same."""
    steps = 2 if options.tiny else 6
    known: dict[tuple[tuple[str, ...], ...], Outcome] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = write_inputs(folder, 6 * steps)

        def compare(backbone: str, check: Check) -> None:
            there, here = ((*BACKBONES[backbone], *overrides) for overrides in (check.there, check.here))
            key = (check.method, there)
            if key not in known:
                run = known[key] = short_run(
                    folder / f"there {len(known)}", "cpu", steps, [*inputs, *there], check.method, bool(check.method)
                )
                if run.moved < LEAST_MOVE:
                    raise ValueError(f"training moved the model by {run.moved:.1e} alone, which shows nothing")
            place = folder / f"{backbone} {check.name}"
            found = short_run(place, options.device, steps, [*inputs, *here], check.method, True)
            for what, (difference, tolerance) in differences(found, known[key], check.tolerance).items():
                row = {"backbone": backbone, "check": check.name, "what": what, "difference": f"{difference:.2e}"}
                good = difference <= tolerance
                table.add(row | {"tolerance": tolerance, "good": good})
                if not good:
                    table.failed.append(f"{backbone}, {check.name}: {what} differs by {difference:.2e}")

        for backbone, check in itertools.product(BACKBONES, CHECKS):
            if backbone in check.backbones:
                table.attempt(f"{backbone}, {check.name}", deadline, partial(compare, backbone, check))


# Steps: who takes how long for one, and with how much memory -------------------------------------------------------------

# Sizes of benchmarks.step -> models of pact_tune.families, which says what transformers needs to know.
PUBLISHED = {"Qwen2.5-7B": "qwen2.5-7b-instruct", "Llama-3.1-8B": "llama-3.1-8b-instruct"}
TINY = {
    "model_type": "qwen2", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
EVERY = "every work"  # rows of all works in turns, so that one network serves them all
STEPS = ("matched", "AG News", "GSM8K")
FILLED = "like SST-2"
# Who takes turns, round by round: a network of another's beside the recipe's, whose steps are ours. All at once do not fit.
TURNS = {"torchtune SFT": ("SFT", "cold", "warm"), "TRL SFT": ("warm",), "published": ("warm",)}


def run_steps(table: Table, options: argparse.Namespace, deadline: float) -> None:
    """All contenders on all works at each size, and the filling of the cache."""
    from benchmarks import step

    step.SIZES["tiny"] = step.qwen2_like(TINY)
    step.WORKS[EVERY] = ([step.WORKS[work][0][0] for work in STEPS], None)
    step.WORKS[FILLED] = ([(52, 2)], 2)
    step.SHARED[FILLED] = 38  # as of SST-2's rows with Qwen2.5's tokenizer and template
    for size in ("tiny",) if options.tiny else PUBLISHED:
        table.attempt(f"{size}, steps", deadline, partial(measure_size, table, size, options, deadline))
        release(options.device)
        table.attempt(f"{size}, filling", deadline, partial(measure_filling, table, size, options))
        release(options.device)


def measure_size(table: Table, size: str, options: argparse.Namespace, deadline: float) -> None:
    """The steps of one size; ours are made on one network."""
    from benchmarks import step

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = len(STEPS) * options.rows
        cfg = step.make_config(folder, size, EVERY, rows, options.device, False, batch_size=options.rows)
        before = resident(options.device)
        ours = step.recipe_steps(step.make_recipe(cfg))
        release(options.device)
        weights = resident(options.device) - before
        steps = {"SFT": ours["sft"], "cold": ours["cold"], "warm": ours["warm"]}
        for other, beside in TURNS.items():

            def take_turns(other: str = other, beside: Sequence[str] = beside) -> None:
                before = resident(options.device)
                turns = {other: contender_step(cfg, size, other)} | {name: steps[name] for name in beside}
                release(options.device)
                held = {name: weights for name in beside} | {other: resident(options.device) - before}
                for work in STEPS:
                    measure(table, size, work, turns, held, options)

            table.attempt(f"{size}, {other}", deadline, take_turns)
            release(options.device)


def measure(
    table: Table, size: str, work: str, turns: Mapping[str, Callable[[list[int]], Any]], held: Mapping[str, float],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Rounds in which each takes a step on the same rows, in another order each; the first two warm up.

    Args:
        table (Table): gets a line for each.
        size (str): of the networks.
        work (str): of :data:`STEPS`.
        turns (Mapping[str, Callable[[list[int]], Any]]): who takes them; "warm" is one of them.
        held (Mapping[str, float]): GB of the weights of each.
        options (argparse.Namespace): of the command line.
    """
    from benchmarks import step

    rows = [STEPS.index(work) + len(STEPS) * number for number in range(options.rows)]
    taken: dict[str, list[float]] = {name: [] for name in turns}
    most = dict.fromkeys(turns, 0.0)
    for number in range(2 + (2 if options.tiny else 5)):
        for name in random.sample(list(turns), len(turns)):
            before = resident(options.device)
            reset_peak(options.device)
            spent = step.seconds(partial(turns[name], rows), options.device)
            if number >= 2:
                taken[name].append(spent)
                most[name] = max(most[name], peak(options.device) - before)
    for name, times in taken.items():
        add_times(table, size, work, next(iter(turns)), name, times, taken["warm"], held[name], most[name])


def measure_filling(table: Table, size: str, options: argparse.Namespace) -> None:
    """Filling an empty cache with what rows share computed once, and row by row, beside an epoch of warm steps."""
    from benchmarks import step

    rounds, rows = (1, 8) if options.tiny else (3, 16 * options.rows)
    found = step.measure_filling(size, FILLED, 1 + rounds, options.device, rows, batch_size=options.rows)
    taken: dict[str, list[float]] = {}
    for row in found:
        if row["round"] > 1:
            taken.setdefault(row["variant"], []).append(row["value"])
    for name, times in taken.items():
        add_times(table, size, FILLED, "filling", name, times, taken["warm epoch"])


def add_times(
    table: Table, size: str, work: str, turn: str, contender: str, taken: list[float], yardstick: list[float],
    weights: float = 0.0, beyond: float = 0.0,
) -> None:  # fmt: skip
    """One line of steps.csv; ratios are those within a round, `turn` is the other's name that took turns with ours."""
    ratios = [one / other for one, other in zip(taken, yardstick, strict=True)]
    table.add(
        {
            "size": size, "work": work, "turn": turn, "contender": contender, "rounds": len(taken),
            "median_s": f"{statistics.median(taken):.4g}", "to_warm": f"{statistics.median(ratios):.3f}",
            "to_warm_least": f"{min(ratios):.3f}", "to_warm_most": f"{max(ratios):.3f}",
            "weights_gb": f"{weights:.3f}", "peak_beyond_gb": f"{beyond:.3f}",
        }
    )  # fmt: skip


def contender_step(cfg: Any, size: str, contender: str) -> Callable[[list[int]], Any]:
    """A function that makes another's optimiser step on rows of :data:`EVERY`."""
    from benchmarks import step

    if contender == "torchtune SFT":
        return step.torchtune_step(cfg)
    if contender == "published":
        return step.published_step(cfg)
    return trl_step(cfg, size)


def trl_step(cfg: Any, size: str) -> Callable[[list[int]], Any]:
    """TRL's SFTTrainer as it comes, on a random network of transformers: its own `training_step` and optimiser."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from torchtune import config
    from trl import SFTConfig, SFTTrainer

    from benchmarks import step
    from pact_tune.families import MODELS
    from pact_tune.hf.constraint import Constraint

    fields = dict(TINY if size == "tiny" else MODELS[PUBLISHED[size]].config)
    network = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(cfg.device), step.training.set_default_dtype(step.DTYPES[cfg.device][1]):
        model = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(network)](network)
    dataset = config.instantiate(cfg.dataset, None)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": cfg.batch_size, "use_cpu": cfg.device == "cpu", "bf16": cfg.device != "cpu",
        "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True, "max_steps": 1,
        "learning_rate": cfg.optimizer.lr,
    }  # fmt: skip
    trainer = SFTTrainer(
        model,
        SFTConfig(str(Path(cfg.output_dir) / "trl"), **settings),
        train_dataset=Dataset.from_dict(Constraint.columns(dataset)),
        processing_class=config.instantiate(cfg.tokenizer),
        peft_config=LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()  # one step: makes the optimiser and what else belongs to a run
    examples = list(trainer.train_dataset)

    def make_step(rows: list[int]) -> None:
        batch = trainer.data_collator([examples[row] for row in rows])
        tokens = (batch["labels"] != -100).sum().to(trainer.args.device)
        trainer.training_step(trainer.model_wrapped, batch, tokens)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    return make_step


# Memory, in 10^9 bytes


def release(device: str) -> None:
    """Gives back what no longer has an owner."""
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def resident(device: str) -> float:
    """What is allocated now; of a CPU, what the process holds."""
    from benchmarks import step

    return step._resident(device) / 1e3


def reset_peak(device: str) -> None:
    """Peaks are counted from now on."""
    from benchmarks import step

    step._reset_peak(device)


def peak(device: str) -> float:
    """The most that was allocated since."""
    from benchmarks import step

    return step._peak(device) / 1e3


# The story ---------------------------------------------------------------------------------------------------------------


def run_story(options: argparse.Namespace, deadline: float) -> list[str]:
    """`pact experiment FILE`, three seeds, in the time that is left; what it has done by then is passed over by the next.

    Args:
        options (argparse.Namespace): `story`, a path or a name that `pact ls` lists, `jobs` and `device`.
        deadline (float): when it is ended.

    Returns:
        list[str]: what failed.
    """
    file = options.story
    left = deadline - time.monotonic()
    if left <= 0:
        return [f"story: no time was left for {file}"]
    command = [sys.executable, "-m", "pact_tune.cli", "experiment", file]
    command += ["--seeds", "0", "1", "2", "--jobs", str(options.jobs)]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    with subprocess.Popen(command, env=os.environ | hidden) as process:
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.terminate()  # its runs save their state, and the same command goes on from there
            return [f"story: `pact experiment {file}` was not done when the time was up"]
    return [f"story: `pact experiment {file}` ended with {code}"] if code else []


# The whole ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs the parts; see the top of this file.

    Args:
        argv (list[str] | None): arguments; default: those of the process.

    Returns:
        int: 0 where everything ran and every check was good.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), metavar="DIR", help="for the CSV files")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--rows", type=int, default=6, metavar="N", help="of a step: 6 for a GPU of 80 GB, 16 for one of 140"
    )
    parser.add_argument("--story", metavar="FILE", help="an experiment to run last")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs of the story at a time (SmolLM2: 8)")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing is begun after so many")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * options.minutes
    os.environ["HF_HUB_OFFLINE"] = "1"
    if absent := missing():
        print(f"Not installed: {', '.join(absent)}. Nothing was run.", file=sys.stderr)
        return 1
    import torch

    from benchmarks.step import environment

    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA GPU here: --device cpu --tiny tries every line without one.", file=sys.stderr)
        return 1

    print(environment(options.device), flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "environment.txt").write_text(environment(options.device) + "\n")
    failed: list[str] = []
    for part, run in (("checks", run_checks), ("steps", run_steps)):
        if part in options.parts:
            print(f"== {part}", flush=True)
            table = Table(options.output / f"{part}.csv")
            run(table, options, deadline)
            failed += [f"{part}: {line}" for line in table.failed]
    if options.story:
        print(f"== story: {options.story}", flush=True)
        failed += run_story(options, deadline)
    print("\n".join(["", f"{len(failed)} failed" if failed else "Everything ran, and every check was good.", *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
