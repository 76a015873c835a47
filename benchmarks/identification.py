"""Identification against the published procedure, in CPU time, on the same models and responses.

    python benchmarks/identification.py
    python benchmarks/identification.py --shared DIR

The published procedure is written here from its description: both models in bfloat16, batch 1, the logits of every
position of both divided by a temperature and cast to fp32, a Python loop over the response positions that takes both
softmaxes and adds to full-vocabulary sums. Both sides run in bfloat16 and in float32, where their d(v) must agree.
One thread; each repetition times all sides one after the other.

`--shared` measures instead what is gained where the prompts' beginning is computed once: prompts of `pact smollm2 prepare`
in DIR with the answers of its alignment rows, its tokenizer, and a random model of Llama's shape.
"""

import argparse
import csv
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pact_tune import scoring
from pact_tune.conversations import encode, load_tokenizer, render, render_prompt
from pact_tune.files import atomic_file
from pact_tune.identification import PRESETS, identify_safety_tokens

RESULTS = Path(__file__).parent / "results"
REQUEST = "How do I paint the fence? What is the best way to clean a window? Is this review positive or negative? "
# Two vocabularies with hardly a network below them, and a network that outweighs its head.
SIZES = (
    {"vocabulary": 32_000, "hidden": 64, "layers": 2},
    {"vocabulary": 32_000, "hidden": 256, "layers": 2},
    {"vocabulary": 32_000, "hidden": 512, "layers": 4},
    {"vocabulary": 152_064, "hidden": 64, "layers": 2},
)
LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 16}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05}
RESPONSE = "I cannot help with that request. I'm sorry, but I can't assist with that. I won't provide such content. "


def make_pair(folder: Path, vocabulary: int, hidden: int, layers: int) -> tuple[Path, Path]:
    """Writes two random Qwen2 models with a padded vocabulary."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny

    size = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
    }
    size |= {"head_dim": hidden // 4, "initializer_range": 0.05}
    return tuple(tiny.tiny_model(folder / name, seed=seed, **size) for seed, name in enumerate(("aligned", "base")))


@torch.inference_mode()
def published(
    aligned: Path, base: Path, prompts: list[str], responses: list[str] | None, longest: int, dtype: torch.dtype
) -> torch.Tensor:
    """d(v), ``[V]``, position by position; without responses the aligned model answers first, one prompt at a time."""
    tokenizer = load_tokenizer(str(aligned))
    safe, unsafe = (AutoModelForCausalLM.from_pretrained(f, dtype=dtype).eval() for f in (aligned, base))
    temperature, total = 1.0, 0.0
    for index, prompt in enumerate(prompts):
        user = [{"role": "user", "content": prompt}]
        mine, theirs = render_prompt(tokenizer, user), encode(tokenizer, f"User: {prompt}\n\nAssistant: ")
        if responses is None:
            one = torch.tensor([mine])
            mask = torch.ones_like(one)
            answer = safe.generate(one, attention_mask=mask, max_new_tokens=longest, do_sample=False)
            response = answer[0, len(mine) :].tolist()
        else:
            response = encode(tokenizer, responses[index])[:longest]
        rows = []
        for model, start in ((safe, mine), (unsafe, theirs)):
            logits = (model(torch.tensor([start + response])).logits / temperature).float()
            rows.append(logits[0, len(start) - 1 : -1])
        difference, reference = torch.zeros(rows[0].shape[-1]), torch.zeros(rows[0].shape[-1])
        for t in range(len(response)):
            probability = rows[0][t].softmax(-1)
            difference += probability - rows[1][t].softmax(-1)
            reference += probability
        total = total + difference / len(response)
    return total / len(prompts)


def measure(function: Callable, *arguments, **options) -> tuple[float, Any]:
    """CPU seconds and the result."""
    start = time.process_time()
    result = function(*arguments, **options)
    return time.process_time() - start, result


def compare(pair: tuple[Path, Path], prompts: list[str], responses: list[str] | None, longest: int) -> dict:
    """Times both sides in both precisions, one after the other."""
    options = PRESETS["official"] | {"responses": responses, "max_response_tokens": longest, "progress": False}
    row: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        row[f"here_{dtype}_s"], tokens = measure(identify_safety_tokens, *pair, prompts, dtype=dtype, **options)
        spent, expected = measure(published, *pair, prompts, responses, longest, getattr(torch, dtype))
        row[f"published_{dtype}_s"] = spent
        if dtype == "float32":
            row["positions"] = tokens.provenance["num_positions"]
            row["max_error"] = (tokens.candidates["scores"] - expected[tokens.candidates["ids"]]).abs().max().item()
    return row


def shared(directory: Path, repetitions: int) -> None:
    """Times one model's sums with each prompt computed whole, and with what they begin with computed once, in turns."""
    tokenizer = load_tokenizer(str(directory / "base"))
    data = {name: directory / "data" / f"{name}.jsonl" for name in ("alignment", "identification")}
    rows = {name: list(map(json.loads, path.read_text().splitlines())) for name, path in data.items()}
    answers = {row["prompt"]: row["response"] for row in rows["alignment"]}
    pairs = []
    for row in rows["identification"]:
        if row["prompt"] in answers:
            user = {"role": "user", "content": row["prompt"]}
            chat = render(tokenizer, [user, {"role": "assistant", "content": answers[row["prompt"]]}])
            ((start, end),) = chat.responses
            pairs.append((chat.tokens[:start], chat.tokens[start:end]))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA)).eval()
    computed: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: computed.append(inputs[0].numel()))
    found: list[dict[str, Any]] = []
    for repetition in range(repetitions + 1):
        chosen = pairs if repetition else pairs[:16]  # the first warms up
        row = {"repetition": repetition, "prompts": len(chosen), "positions": sum(len(r) for _, r in chosen)} | LLAMA
        means = []
        for side in ("whole", "shared") if repetition % 2 else ("shared", "whole"):
            scoring._LONGEST_SHARED.clear()
            if side == "whole":
                scoring._LONGEST_SHARED[model] = 0
            computed.clear()
            row[f"{side}_s"], total = measure(probability_sums, model, chosen)
            row[f"{side}_tokens"] = sum(computed)
            means.append(total / row["positions"])
        row["max_error"] = (means[0] - means[1]).abs().max().item()
        print(row, row["shared_s"] / row["whole_s"], flush=True)
        if repetition:
            found.append(row)
            with atomic_file(RESULTS / "identification_shared_cpu.csv") as path, path.open("w", newline="") as file:
                writer = csv.DictWriter(file, found[0].keys())
                writer.writeheader()
                writer.writerows(found)


def probability_sums(model: LlamaForCausalLM, pairs: list[scoring.Pair]) -> torch.Tensor:
    """Sum of probabilities over all response positions, ``[V]``."""
    batches = ([pairs[i] for i in batch] for batch in scoring.batches_of(pairs, 4096))
    chunks = itertools.chain.from_iterable(scoring.response_logits(model, batch) for batch in batches)
    return sum(logits.softmax(-1).sum(0).double() for logits in chunks)


def main() -> None:
    """Measures every setting and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--shared", type=Path, metavar="DIR", help="of `pact smollm2 prepare`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.shared:
        shared(args.shared, args.repetitions)
        return
    rows = []
    prompts = [REQUEST * (1 + i % 3) + str(i) for i in range(args.prompts)]
    for size in SIZES:
        with tempfile.TemporaryDirectory() as directory:
            pair = make_pair(Path(directory), **size)
            for work, responses in (("scoring", [RESPONSE * 3] * len(prompts)), ("responses and scoring", None)):
                for _ in range(args.repetitions):
                    rows.append({"work": work} | size | compare(pair, prompts, responses, args.response_tokens))
                    print(rows[-1], flush=True)
                    write(rows, args)


def write(rows: list[dict], args: argparse.Namespace) -> None:
    """Writes every repetition as CSV, and medians as Markdown."""
    with atomic_file(RESULTS / "identification_cpu.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "# Identification against the published procedure (CPU)",
        "",
        f"Random Qwen2 models, {args.prompts} prompts, responses of at most {args.response_tokens} tokens, model loading "
        f"included; one thread, torch {torch.__version__}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{_bfloat16()}. CPU seconds, medians of {args.repetitions} repetition(s). Each repetition is in identification_cpu.csv.",
        "",
        '"scoring": responses given, as to the released code, which has bfloat16 weights. "responses and scoring": the aligned '
        "model answers first (Eq. 1), one prompt at a time with a key-value cache on the published side, in batches here; the "
        "released code has no such step, so this baseline is ours.",
        "",
        "| work | vocabulary | hidden, layers | float32: here, s | published, s | times | bfloat16: here, s | published, s | "
        "times | max. difference of d(v), float32 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["work"], row["vocabulary"], row["hidden"], row["layers"]) for row in rows):
        group = [row for row in rows if (row["work"], row["vocabulary"], row["hidden"], row["layers"]) == key]
        cells = [cell for dtype in ("float32", "bfloat16") for cell in _cells(group, dtype)]
        error = max(row["max_error"] for row in group)
        lines.append(f"| {key[0]} | {key[1]:,} | {key[2]}, {key[3]} | {' | '.join(cells)} | {error:.0e} |")
    with atomic_file(RESULTS / "identification_cpu.md") as path:
        path.write_text("\n".join(lines) + "\n")


def _cells(group: list[dict], dtype: str) -> list[str]:
    """Seconds here, seconds published, and how many times as long that is."""
    here, there = ([row[f"{side}_{dtype}_s"] for row in group] for side in ("here", "published"))
    ratio = statistics.median(b / a for a, b in zip(here, there, strict=True))
    return [f"{statistics.median(here):.2f}", f"{statistics.median(there):.2f}", f"{ratio:.1f}"]


def _bfloat16() -> str:
    flags = Path("/proc/cpuinfo").read_text()
    return "with bfloat16 instructions" if "_bf16" in flags else "without bfloat16 instructions"


if __name__ == "__main__":
    main()
