"""`pact cache`: look after the reference caches that runs share."""

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.errors import UserError
from pact_tune.reference.cache import Summary, default_directory, is_damaged, prune, shards_of, summaries


def main(argv: list[str] | None = None) -> int:
    """Runs `pact cache list|info|verify|prune|build`.

    Args:
        argv (list[str] | None): the command line after `pact cache`.

    Returns:
        int: exit code; 1 when `verify` found damage or `build` bad input.

    Raises:
        UserError: no such reference.
    """
    args, overrides = _parser().parse_known_args(argv)
    if args.command == "build":
        return _build(args.config, overrides)
    if overrides:
        raise UserError(f"`pact cache {args.command}` does not know '{overrides[0]}'; see its --help.")
    root = args.directory or default_directory()
    if args.command == "list":
        return _list(root)
    if args.command == "info":
        return _info(root, args.reference)
    if args.command == "verify":
        return _verify(root, args.reference)
    return _prune(root, args.max_gb, args.older_than)


def _parser() -> Parser:
    parser = Parser(prog="pact cache", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    where = Parser(add_help=False)
    where.add_argument("--directory", type=Path, help="root of the caches, as in reference_cache.directory")
    one = Parser(add_help=False)
    one.add_argument("reference", nargs="?", default="", help="name of a reference, or how it begins; default: all")
    commands.add_parser("list", parents=[where], help="all references, the most recently used first")
    commands.add_parser("info", parents=[where, one], help="what a reference's numbers depend on")
    commands.add_parser("verify", parents=[where, one], help="compare all checksums")
    remove = commands.add_parser("prune", parents=[where], help="remove references, the least recently used first")
    remove.add_argument("--max-gb", type=float, help="until all that is left takes at most this much")
    remove.add_argument("--older-than", type=float, metavar="DAYS", help="those last used before that")
    build = commands.add_parser("build", help="fill the cache that a config's run needs, without training")
    build.add_argument("config", help="name or path; overrides (KEY=VALUE) may follow, as for `tune run`")
    return parser


def _list(root: Path) -> int:
    found = summaries(root)
    print(f"{len(found)} reference(s) in {root}, {sum(s.bytes for s in found) / 1e9:.3g} GB")
    for summary in found:
        used = datetime.datetime.fromtimestamp(summary.last_used).strftime("%Y-%m-%d %H:%M")
        print(
            f"{summary.name}  {summary.bytes / 1e6:8.1f} MB  {summary.conversations:7d} views  last used {used}  "
            f"{_what(summary.description)}"
        )
    return 0


def _what(description: dict[str, Any]) -> str:
    """What a reference is of, on one line."""
    reference = description.get("reference")
    if reference is None:
        return "manifest.json is damaged; the next run that uses it mends it"
    tokens = f" of {len(reference['safety_tokens'])} tokens" if "safety_tokens" in reference else ""
    tail = " + tail" if reference.get("tail") else ""
    return (
        f"weights {str(reference.get('weights'))[:8]}, {reference.get('reading')}{tokens}{tail}, {description['dtype']}"
    )


def _info(root: Path, name: str) -> int:
    for summary in _matching(root, name):
        numbers = {
            "directory": str(root / summary.name),
            "shards": summary.shards,
            "views": summary.conversations,
            "positions": summary.positions,
            "bytes": summary.bytes,
            "bytes a position": round(summary.bytes / max(summary.positions, 1), 1),
        }
        print(json.dumps(numbers | summary.description, indent=2))
    return 0


def _verify(root: Path, name: str) -> int:
    damaged = shards = 0
    for summary in _matching(root, name):
        for shard in shards_of(root / summary.name):
            shards += 1
            if is_damaged(shard):
                damaged += 1
                print(f"damaged: {shard} (the next run that needs it computes it again)")
    print(f"{shards} shard(s) verified, {damaged} damaged")
    return int(damaged > 0)


def _prune(root: Path, max_gb: float | None, older_than: float | None) -> int:
    if max_gb is None and older_than is None:
        raise UserError("`pact cache prune` needs --max-gb or --older-than.")
    removed = prune(root, max_gb, older_than)
    for name in removed:
        print(f"removed {name}")
    print(f"{len(removed)} reference(s) removed")
    return 0


def _matching(root: Path, name: str) -> list[Summary]:
    found = [summary for summary in summaries(root) if summary.name.startswith(name)]
    if not found:
        which = f"no reference '{name}'" if name else "no reference"
        raise UserError(f"There is {which} in '{root}': see `pact cache list`, or give --directory.")
    return found


def _build(name: str, overrides: list[str]) -> int:
    """Sets the recipe up, which fills the cache; on several processes: `torchrun ... -m pact_tune.tools.cache build`."""
    import pact_lora_finetune  # the recipe's imports take seconds that the other commands need not wait

    from pact_tune.torchtune.config import read_command_line

    argv = ["--config", name, *overrides]
    if read_command_line(argv).reference_cache is None:
        raise UserError("The config sets reference_cache: null, so a run would not read it: remove that line.")
    message = pact_lora_finetune.run([*argv, "reference_cache.lazy=False"], lambda recipe: None, writes=False)
    if message:
        print(message, file=sys.stderr)
    return int(message is not None)


if __name__ == "__main__":
    sys.exit(cli.main(["cache", *sys.argv[1:]]))
