"""pact compare: evaluations side by side, as a table and as one page."""

import sys
from pathlib import Path

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.environment import install
from pact_tune.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Prints the table and writes page, Markdown and CSV.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(
        prog="pact compare",
        description="Put evaluations side by side. Each argument is an evaluation's folder (of `pact evaluate`, with a "
        "summary.json), or NAME=DIR,DIR,... for runs that differ in their seed alone.",
    )
    parser.add_argument("evaluations", nargs="+", metavar="[NAME=]DIR[,DIR...]")
    parser.add_argument("--output", type=Path, default=Path("outputs/compare"), metavar="DIR")
    parser.add_argument("--baseline", metavar="NAME", help="tested against (default: the first that is not 'Initial')")
    parser.add_argument("--title", default="Comparison")
    parser.add_argument(
        "--prompts", type=int, default=40, help="rows of each benchmark that the page shows (default: 40)"
    )
    args = parser.parse_args(argv)
    if args.prompts < 0:
        raise UserError("--prompts must be 0 or more.")
    try:
        from pact_tune.evaluation import report
    except ImportError as error:
        raise UserError(f"The report needs scipy and jinja2 ({error}): {install('eval')}.") from error

    folders: dict[str, list[Path]] = {}
    for text in args.evaluations:
        name, equals, rest = text.partition("=")
        paths = [Path(part) for part in (rest if equals else text).split(",")]
        if not equals:
            if paths[0].is_file():  # a shell's DIR/* matches an earlier page too
                continue
            name = paths[0].name
        if len({path.resolve() for path in paths}) < len(paths):
            raise UserError(f"'{name}' has the same evaluation twice: give each seed's folder once.")
        if name in folders:
            raise UserError(f"Two evaluations are called '{name}': name them apart, as NAME=DIR.")
        folders[name] = paths
    if not folders:
        raise UserError("None of the arguments is a folder: give evaluation folders.")
    comparison = report.compare(folders, args.baseline)
    comparison.write(args.output, args.title, prompts=args.prompts)
    print(comparison.text())
    print(f"\nPage: {args.output / report.PAGE_FILE}; also {report.MARKDOWN_FILE} and {report.CSV_FILE} beside it.")


if __name__ == "__main__":
    sys.exit(cli.main(["compare", *sys.argv[1:]]))
