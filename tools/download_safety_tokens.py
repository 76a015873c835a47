"""pact tokens download: safety tokens from the Hugging Face Hub."""

import sys
from pathlib import Path

from pact_tune import cli, hub
from pact_tune.arguments import Parser
from pact_tune.errors import printable
from pact_tune.safety_tokens import SafetyTokens, check_output


def main(argv: list[str] | None = None) -> None:
    """Downloads safety tokens, checks them and writes them to a folder.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(prog="pact tokens download", description="Download safety tokens from the Hub.")
    parser.add_argument("source", metavar="NAMESPACE/NAME", help=f"or one of: {', '.join(sorted(hub.KNOWN))}")
    parser.add_argument("--subfolder", metavar="MODEL", help="folder of the model in the repository")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: the model's name")
    args = parser.parse_args(argv)
    output = args.output or Path(args.subfolder or args.source.split("/")[-1])
    check_output(output)
    folder = hub.download(args.source, revision=args.revision, subfolder=args.subfolder)
    tokens = SafetyTokens.load(folder)
    hub.save_copy(folder, output)
    model = printable(tokens.provenance.get("aligned_model", "unknown model"))
    print(f"{len(tokens)} safety tokens of {model} written to {output}")


if __name__ == "__main__":
    sys.exit(cli.main(["tokens", "download", *sys.argv[1:]]))
