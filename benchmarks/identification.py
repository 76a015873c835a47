"""Identification against the published procedure, in CPU time, on the same models and responses.

    python benchmarks/identification.py

The published procedure is written here from its description: batch 1, the logits of every position of both models in
fp32, a Python loop over the response positions that takes both softmaxes and adds to full-vocabulary sums. The d(v) of
both sides is compared. One thread; each repetition times both sides one after the other.
"""

import argparse
import csv
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from pact_tune.conversations import load_tokenizer, render, render_prompt
from pact_tune.files import atomic_file
from pact_tune.identification import identify_safety_tokens

RESULTS = Path(__file__).parent / "results"
REQUEST = "How do I paint the fence? What is the best way to clean a window? Is this review positive or negative? "
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
def published(aligned: Path, base: Path, prompts: list[str], responses: list[str] | None, longest: int) -> torch.Tensor:
    """d(v), ``[V]``, position by position; without responses the aligned model answers first, one prompt at a time."""
    tokenizer = load_tokenizer(str(aligned))
    safe, unsafe = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (aligned, base))
    total, reference, count = 0.0, 0.0, 0
    for index, prompt in enumerate(prompts):
        user = [{"role": "user", "content": prompt}]
        ids = render_prompt(tokenizer, user)
        start = len(ids)
        if responses is None:
            one = torch.tensor([ids])
            mask = torch.ones_like(one)
            ids = safe.generate(one, attention_mask=mask, max_new_tokens=longest, do_sample=False)[0].tolist()
        else:
            ids = render(tokenizer, [*user, {"role": "assistant", "content": responses[index]}]).tokens[
                : start + longest
            ]
        p, q = (model(torch.tensor([ids])).logits[0].float() for model in (safe, unsafe))
        for t in range(start - 1, len(ids) - 1):
            probability = p[t].softmax(-1)
            total = total + (probability - q[t].softmax(-1))
            reference = reference + probability
            count += 1
    return total / count


def measure(function, *arguments, **options) -> tuple[float, float, object]:
    """CPU seconds, wall seconds and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    return time.process_time() - cpu, time.perf_counter() - wall, result


def compare(pair: tuple[Path, Path], prompts: list[str], responses: list[str] | None, longest: int) -> dict:
    """Times both sides, one after the other."""
    slow, slow_wall, expected = measure(published, *pair, prompts, responses, longest)
    options = {"responses": responses, "max_response_tokens": longest, "progress": False}
    fast, fast_wall, tokens = measure(identify_safety_tokens, *pair, prompts, **options)
    error = (tokens.candidates["scores"] - expected[tokens.candidates["ids"]]).abs().max().item()
    return {
        "positions": tokens.provenance["num_positions"],
        "published_cpu_s": slow,
        "here_cpu_s": fast,
        "ratio": slow / fast,
        "published_wall_s": slow_wall,
        "here_wall_s": fast_wall,
        "max_error": error,
    }


def main() -> None:
    """Measures every setting and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    prompts = [REQUEST * (1 + i % 3) + str(i) for i in range(args.prompts)]
    for vocabulary, hidden in ((32_000, 64), (32_000, 256), (152_064, 64)):
        with tempfile.TemporaryDirectory() as directory:
            pair = make_pair(Path(directory), vocabulary, hidden, layers=2)
            for work, responses in (("scoring", [RESPONSE * 3] * len(prompts)), ("responses and scoring", None)):
                for _ in range(args.repetitions):
                    row = {"work": work, "vocabulary": vocabulary, "hidden": hidden}
                    rows.append(row | compare(pair, prompts, responses, args.response_tokens))
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
        f"Random Qwen2 models of 2 layers, {args.prompts} prompts, responses of at most {args.response_tokens} tokens, model "
        f"loading included; one thread, torch {torch.__version__}, {platform.machine()}, other work on the machine. Medians of "
        f"up to {args.repetitions} paired repetitions; each of them is in identification_cpu.csv.",
        "",
        '"scoring": the responses are given, as in the released code. "responses and scoring": the aligned model answers '
        "first (Eq. 1), one prompt at a time with a key-value cache on the published side, in batches here; the released "
        "code has no such step, so this baseline is ours.",
        "",
        "| work | vocabulary | hidden | repetitions | published, CPU s | here, CPU s | ratio | lowest ratio | max. difference of d(v) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((row["work"], row["vocabulary"], row["hidden"]) for row in rows):
        group = [row for row in rows if (row["work"], row["vocabulary"], row["hidden"]) == key]
        slow, fast, ratio = (statistics.median(r[n] for r in group) for n in ("published_cpu_s", "here_cpu_s", "ratio"))
        lowest, error = min(row["ratio"] for row in group), max(row["max_error"] for row in group)
        lines.append(
            f"| {key[0]} | {key[1]:,} | {key[2]} | {len(group)} | {slow:.2f} | {fast:.2f} | {ratio:.1f} | {lowest:.1f} | {error:.0e} |"
        )
    lines += [
        "",
        "No large factor can be had from the scoring step on a CPU: the exact sums need the head's product and "
        "one exponential for each position and token, and the published procedure pays for the same.",
    ]
    with atomic_file(RESULTS / "identification_cpu.md") as path:
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
