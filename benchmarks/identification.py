"""Identification against the published procedure, in CPU time, on the same models and responses.

    python benchmarks/identification.py

The published procedure is written here from its description: batch 1, the logits of every position of both models in
fp32, a Python loop over the response positions that takes both softmaxes and adds to full-vocabulary sums. Both sides
get the same responses, and their d(v) is compared. One thread; each repetition times both sides one after the other.
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
def published(aligned: Path, base: Path, prompts: list[str], responses: list[str], longest: int) -> torch.Tensor:
    """d(v), ``[V]``, position by position."""
    tokenizer = load_tokenizer(str(aligned))
    safe, unsafe = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (aligned, base))
    total, reference, count = 0.0, 0.0, 0
    for prompt, response in zip(prompts, responses, strict=True):
        user = [{"role": "user", "content": prompt}]
        start = len(render_prompt(tokenizer, user))
        ids = render(tokenizer, [*user, {"role": "assistant", "content": response}]).tokens[: start + longest]
        p, q = (model(torch.tensor([ids])).logits[0].float() for model in (safe, unsafe))
        for t in range(start - 1, len(ids) - 1):
            probability = p[t].softmax(-1)
            total = total + (probability - q[t].softmax(-1))
            reference = reference + probability
            count += 1
    return total / count


def measure(call) -> tuple[float, float, object]:
    """CPU seconds, wall seconds and the result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return time.process_time() - cpu, time.perf_counter() - wall, result


def main() -> None:
    """Measures every setting and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--response-tokens", type=int, default=64)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for vocabulary, hidden, layers in ((32_000, 64, 2), (32_000, 256, 2), (152_064, 64, 2)):
        with tempfile.TemporaryDirectory() as directory:
            pair = make_pair(Path(directory), vocabulary, hidden, layers)
            prompts = [REQUEST * (1 + i % 3) + str(i) for i in range(args.prompts)]
            responses = [RESPONSE * 3 for _ in prompts]
            for repetition in range(args.repetitions):
                slow, slow_wall, expected = measure(lambda: published(*pair, prompts, responses, args.response_tokens))
                fast, fast_wall, tokens = measure(
                    lambda: identify_safety_tokens(
                        *pair, prompts, responses=responses, max_response_tokens=args.response_tokens, progress=False
                    )
                )
                error = (tokens.candidates["scores"] - expected[tokens.candidates["ids"]]).abs().max().item()
                positions = tokens.provenance["num_positions"]
                rows.append(
                    (
                        vocabulary,
                        hidden,
                        layers,
                        repetition,
                        positions,
                        slow,
                        fast,
                        slow / fast,
                        slow_wall,
                        fast_wall,
                        error,
                    )
                )
                print(
                    f"V {vocabulary} H {hidden}: published {slow:.2f} s, here {fast:.2f} s CPU, ratio {slow / fast:.1f}, "
                    f"wall {slow_wall:.2f} / {fast_wall:.2f}, largest difference of d(v) {error:.1e}",
                    flush=True,
                )
    if not args.no_write:
        write(rows, args)


def write(rows: list[tuple], args: argparse.Namespace) -> None:
    """Writes every repetition as CSV, and medians as Markdown."""
    names = "vocabulary hidden layers repetition positions published_cpu_s here_cpu_s ratio published_wall_s here_wall_s max_error"
    with atomic_file(RESULTS / "identification_cpu.csv") as path, path.open("w", newline="") as file:
        csv.writer(file).writerows([names.split(), *rows])
    lines = [
        "# Identification against the published procedure (CPU)",
        "",
        f"Scoring of given responses, models loaded included; {args.prompts} prompts, responses of {args.response_tokens} tokens,",
        f"one thread, torch {torch.__version__}, {platform.machine()}. Medians of {args.repetitions} paired repetitions; all of them in identification_cpu.csv.",
        "",
        "| vocabulary | hidden | layers | published, CPU s | here, CPU s | ratio | ratio, lowest | largest difference of d(v) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in dict.fromkeys(row[:3] for row in rows):
        group = [row for row in rows if row[:3] == setting]
        slow, fast, ratio = (statistics.median(row[i] for row in group) for i in (5, 6, 7))
        lowest, error = min(row[7] for row in group), max(row[10] for row in group)
        lines.append(
            f"| {setting[0]:,} | {setting[1]} | {setting[2]} | {slow:.2f} | {fast:.2f} | {ratio:.1f} | {lowest:.1f} | {error:.1e} |"
        )
    with atomic_file(RESULTS / "identification_cpu.md") as path:
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
