"""pact rows: a task's training rows, asked as its benchmark asks."""

import dataclasses
import json
import sys
from pathlib import Path

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Writes one row a line: messages, the last of which is the right answer.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(
        prog="pact rows",
        description="Write the rows of a task (sst2, ag_news, gsm8k) as training rows with the prompt that `pact evaluate` asks, so "
        "that what is trained is what is measured.",
    )
    parser.add_argument("task", help="a task that `pact evaluate --list` shows")
    parser.add_argument("--split", default="train", help="of the Hub data set (default: train)")
    parser.add_argument("--file", type=Path, help="a file of the same columns, instead of the Hub")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    args = parser.parse_args(argv)
    if args.output.suffix != ".jsonl":
        raise UserError(f"--output is '{args.output}'; give the name of a .jsonl file.")
    from pact_tune.evaluation import benchmarks
    from pact_tune.files import atomic_file

    benchmark = benchmarks.find(args.task)
    if benchmark.kind != "task":
        raise UserError(f"'{args.task}' is no task but a set of {benchmark.kind} requests, which have no right answer.")
    hub = benchmark.hub and (*benchmark.hub[:2], args.split)
    loaded = benchmarks.load(dataclasses.replace(benchmark, hub=hub, file=args.file or benchmark.file))
    if not all("answer" in item.target for item in loaded.items):
        raise UserError(f"Rows of '{loaded.source}' have no 'answer' to train on: add the column.")
    rows = [[*item.messages, {"role": "assistant", "content": item.target["answer"]}] for item in loaded.items]
    with atomic_file(args.output) as file, file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
    print(f"{len(rows)} rows of {loaded.source}: {args.output}")


if __name__ == "__main__":
    sys.exit(cli.main(["rows", *sys.argv[1:]]))
