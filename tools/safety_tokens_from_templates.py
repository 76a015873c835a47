"""pact tokens from-templates: safety tokens from refusal templates and a tokenizer; nothing is measured."""

import sys
from pathlib import Path

from pact_tune import cli, hub
from pact_tune.arguments import Parser
from pact_tune.conversations import load_tokenizer
from pact_tune.errors import UserError
from pact_tune.prompts import column, read_prompts
from pact_tune.safety_tokens import check_output, safety_tokens_from_templates


def main(argv: list[str] | None = None) -> None:
    """Writes the safety tokens of a tokenizer.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(
        prog="pact tokens from-templates",
        description="Safety tokens from refusal templates and a tokenizer alone: no model, uniform weights.",
    )
    parser.add_argument("--tokenizer", required=True, metavar="MODEL", help="folder, Hub name, or a short name")
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="folder to write")
    parser.add_argument("--templates", metavar="FILE", help="refusal openers, one a line (.txt); default: built in")
    parser.add_argument("-k", "--k", type=int, help="only the K that most templates use")
    parser.add_argument("--trust-remote-code", action="store_true", help=cli.TRUST_HELP)
    args = parser.parse_args(argv)
    if args.k is not None and args.k < 1:
        raise UserError(f"-k must be at least 1, not {args.k}.")
    check_output(args.output)
    templates = column(read_prompts(args.templates), "prompt", args.templates) if args.templates else None
    known = hub.KNOWN.get(args.tokenizer.lower())
    tokenizer = load_tokenizer(known.aligned if known else args.tokenizer, args.trust_remote_code)
    tokens = safety_tokens_from_templates(tokenizer, templates)
    if args.k is not None:
        tokens = tokens.select(args.k, "reference_probability", "uniform")
    tokens.save(args.output)
    print(f"{len(tokens)} safety tokens, not measured: they come from templates and all weigh the same.")
    print(f"Written to {args.output}; look at them with: pact tokens show {args.output}")


if __name__ == "__main__":
    sys.exit(cli.main(["tokens", "from-templates", *sys.argv[1:]]))
