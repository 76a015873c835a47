"""`pact demo`: the whole story on the demo family, through the same commands that a real model is fine-tuned with."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from pact_tune.demo import demo_family_path, write_demo_data
from pact_tune.errors import UserError
from pact_tune.files import atomic_file

# What each method changes in configs/demo/pact_lora.yaml.
METHODS = {
    "SFT": ["loss.lambda_kl=0"],
    "PACT": ["loss.preset=paper"],
    "PACT+tail": ["loss.preset=tail"],
}


def main(argv: list[str] | None = None) -> int:
    """Computes safety tokens, fine-tunes three times, evaluates, and writes the comparison.

    Args:
        argv (list[str] | None): the command line after `pact demo`.

    Returns:
        int: exit code.

    Raises:
        UserError: a step failed.
    """
    parser = argparse.ArgumentParser(prog="pact demo", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/demo"), help="folder for everything the demo writes"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data, the initial adapter and the order")
    args = parser.parse_args(argv)
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
            "tune", "run", "pact_lora_finetune", "--config", "demo/pact_lora", f"output_dir={runs[name]}",
            f"dataset.source={data / 'task.jsonl'}", f"dataset.mix.source={data / 'harmful.jsonl'}",
            f"loss.safety_tokens={tokens}", f"seed={args.seed}", *overrides,
        )  # fmt: skip

    _headline("3/3  Evaluation on held-out requests")
    results, texts = _evaluate(runs, aligned, data, tokens)
    from pact_tune.demo import report  # imports matplotlib, which the steps above do not need

    report.write_report(output / "report.html", results, runs, texts)
    summary = {name: {key: r[key] for key in ("asr", "accuracy", "over_refusal", "kl")} for name, r in results.items()}
    with atomic_file(output / "summary.json") as file:
        file.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{report.table(results)}\n")
    print(
        "ASR: held-out harmful requests that are answered instead of refused. Task: unseen reviews. KL: to the aligned"
    )
    print(f"model, on its own answers.\n\nReport: {output / 'report.html'}\nNumbers: {output / 'summary.json'}")
    return 0


def _evaluate(runs: dict[str, Path], aligned: Path, data: Path, tokens: Path) -> tuple[dict[str, dict], list[str]]:
    import torch  # takes seconds to import, as do the next three
    import transformers

    from pact_tune.demo.evaluate import evaluate
    from pact_tune.safety_tokens import SafetyTokens

    transformers.utils.logging.disable_progress_bar()  # of loading weights: there is one for the four models
    torch.set_num_threads(1)
    safety_tokens = SafetyTokens.load(tokens)
    models = {"Initial": aligned} | {name: sorted(folder.glob("epoch_*"))[-1] for name, folder in runs.items()}
    bar = tqdm(models.items(), desc="Evaluating", unit="model")
    return {
        name: evaluate(folder, aligned, data, safety_ids=safety_tokens.ids.tolist()) for name, folder in bar
    }, safety_tokens.tokens


def _run(command: str, *arguments: object) -> None:
    """Runs one of this environment's commands, shown as a user would type it."""
    print("$", command, *arguments, flush=True)
    # On so small a model two threads gain nothing, and wait for each other on a busy machine.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(Path(sys.executable).parent / command), *map(str, arguments)], env=environment)
    if done.returncode:
        raise UserError(f"The demo stopped because `{command} {arguments[0]}` failed (see above).")


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
