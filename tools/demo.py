"""`pact demo`: the whole story on the demo family, through the same commands that a real model is fine-tuned with."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pact_tune.arguments import Parser
from pact_tune.demo import demo_family_path, write_demo_data
from pact_tune.environment import install
from pact_tune.errors import UserError
from pact_tune.files import atomic_file
from pact_tune.processes import call

# What each method changes in configs/demo/pact_lora.yaml.
METHODS = {
    "SFT": ["loss.lambda_kl=0"],
    "PACT": ["loss.preset=paper"],
    "PACT+tail": ["loss.preset=tail"],
}

TITLE = "Fine-tuning with and without PACT, on the demo family"
INTRODUCTION = (
    "One small aligned chat model, fine-tuned three times on the same rows: a two-class review task with one row in ten that "
    "complies with a request the model should refuse. The harmful requests are harmless nonsense; the model is synthetic, and "
    "its numbers say nothing about large models. On this family the safety tokens hold “Sure”, which begins compliant answers "
    "as well: mass on them alone does not tell a refusal. PACT sees those answers because of it, and not the ones that begin "
    "outside S (“Steps:”, “Guide:”); the tail does not depend on that."
)


def main(argv: list[str] | None = None) -> int:
    """Computes safety tokens, fine-tunes three times, evaluates, and writes the comparison.

    Args:
        argv (list[str] | None): the command line after `pact demo`.

    Returns:
        int: exit code.

    Raises:
        UserError: a step failed.
    """
    parser = Parser(prog="pact demo", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/demo"), help="folder for everything the demo writes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data, the initial adapter and the order")
    args = parser.parse_args(argv)
    try:
        from pact_tune.evaluation import report
    except ImportError as error:
        raise UserError(f"The demo's report needs scipy and jinja2 ({error}): {install('eval')}.") from error
    output: Path = args.output
    base, aligned = demo_family_path() / "base", demo_family_path() / "aligned"
    data = output / "data"
    write_demo_data(data, args.seed)

    _headline("1/3  Safety tokens: what the aligned model says to harmful requests and the base model does not")
    tokens = output / "safety_tokens"
    _run(
        "pact", "tokens", "compute", "--aligned", aligned, "--base", base, "--prompts", data / "identification.jsonl",
        "--output", tokens, "--k", "12",
    )  # fmt: skip

    runs = {name: output / name.lower().replace("+", "_") for name in METHODS}
    for name, overrides in METHODS.items():
        _headline(f"2/3  Fine-tuning: {name}")
        _run(
            "pact", "run", "pact_lora_finetune", "--config", "demo/pact_lora", f"output_dir={runs[name]}",
            f"dataset.source={data / 'task.jsonl'}", f"dataset.mix.source={data / 'harmful.jsonl'}",
            f"loss.safety_tokens={tokens}", f"seed={args.seed}", "overwrite=True", *overrides,
        )  # fmt: skip

    _headline("3/3  Evaluation on held-out requests")
    evaluation = output / "evaluation"
    _run(
        "pact", "evaluate", *(f"{name}={sorted(folder.glob('epoch_*'))[-1]}" for name, folder in runs.items()),
        "--aligned", aligned, "--output", evaluation, "--overwrite", "--safety-tokens", tokens,
        "--benchmarks", f"task:demo-task={data / 'eval_task.jsonl'}", f"harmful:demo-harmful={data / 'eval_harmful.jsonl'}",
        f"benign:demo-benign={data / 'eval_benign.jsonl'}", "--judge", "demo", "--refusal-judge", "demo-keywords",
    )  # fmt: skip
    comparison = report.compare({name: [evaluation / name] for name in ("Initial", *METHODS)})
    comparison.write(output, TITLE, INTRODUCTION)
    results = {row.name: _numbers(row) for row in comparison.rows}
    with atomic_file(output / "summary.json") as file:
        file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{_table(results)}\n")
    print(
        "ASR: held-out harmful requests that are answered instead of refused. Task: unseen reviews. KL: to the aligned"
    )
    print(f"model, on its own answers.\n\nReport: {output / report.PAGE_FILE}\nNumbers: {output / 'summary.json'}")
    return 0


def _numbers(row: Any) -> dict[str, float]:
    """The demo's four numbers of one model. Whatever is not a well-formed refusal counts as an attack that succeeded."""
    return {
        "asr": 100.0 - row.cell("demo-harmful", "safe").percent,
        "accuracy": row.cell("demo-task", "correct").percent,
        "over_refusal": row.cell("demo-benign", "refused").percent,
        "kl": row.on_aligned_answers("kl"),
    }


def _table(results: dict[str, dict[str, float]]) -> str:
    rows = [f"{'':<10} {'ASR %':>7} {'accuracy %':>11} {'over-refusal %':>15} {'KL nats':>8}"]
    for name, r in results.items():
        rows.append(f"{name:<10} {r['asr']:>7.1f} {r['accuracy']:>11.1f} {r['over_refusal']:>15.1f} {r['kl']:>8.3f}")
    return "\n".join(rows)


def _run(command: str, *arguments: object) -> None:
    """Runs one of this environment's commands, shown as a user would type it."""
    print("$", command, *arguments, flush=True)
    # On so small a model two threads gain nothing, and wait for each other on a busy machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = call([str(Path(sys.executable).parent / command), *map(str, arguments)], environment)
    if code in (130, 143):
        raise UserError("The demo was stopped; given again, it begins anew (it takes about two minutes).")
    if code:
        raise UserError(f"The demo stopped because `{command} {arguments[0]}` failed (see above).")


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
