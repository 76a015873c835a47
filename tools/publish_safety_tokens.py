"""pact tokens publish: safety tokens to the Hugging Face Hub."""

import argparse
import sys

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.errors import UserError
from pact_tune.hub import Published
from pact_tune.publishing import publish
from pact_tune.safety_tokens import SafetyTokens, prebuilt_names


def main(argv: list[str] | None = None) -> None:
    """Publishes safety tokens.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(
        prog="pact tokens publish",
        description="Publish safety tokens: one commit and one tag a version, none when nothing changed.",
        epilog="Log in with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("directory", nargs="?", metavar="DIR", help="folder with safety tokens")
    parser.add_argument("--prebuilt", action="store_true", help="instead of DIR: all that come with the package")
    parser.add_argument("--repo", required=True, metavar="NAMESPACE/NAME", help="made where it does not exist")
    parser.add_argument("--subfolder", metavar="MODEL", help="folder of the model in the repository")
    parser.add_argument("--private", action="store_true", help="the repository must be private")
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")
    args = parser.parse_args(argv)
    if args.repo.count("/") != 1:
        raise UserError(f"--repo needs NAMESPACE/NAME, not '{args.repo}'.")
    for tokens, subfolder in _chosen(args):
        _report(publish(tokens, args.repo, subfolder, private=args.private, dry_run=args.dry_run), args.dry_run)


def _chosen(args: argparse.Namespace) -> list[tuple[SafetyTokens, str]]:
    """What to publish, and under which folder's name."""
    if args.prebuilt and (args.directory or args.subfolder):
        raise UserError(
            "--prebuilt publishes all that come with the package, each in its own folder: leave DIR and --subfolder out."
        )
    if args.prebuilt:
        return [(SafetyTokens.load(name), name.replace("/", "-")) for name in prebuilt_names()]
    if not args.directory or not args.subfolder:
        raise UserError("Give DIR and --subfolder, or --prebuilt.")
    return [(SafetyTokens.load(args.directory), args.subfolder)]


def _report(done: Published, dry_run: bool) -> None:
    if dry_run:
        files = "".join(f"\n  {path}" for path in done.changed)
        print(
            f"Dry run; would write to {done.repo} as {done.tag}:{files}"
            if files
            else f"Dry run; {done.repo} is up to date."
        )
    elif done.changed and done.commit is not None:
        print(f"Published to {done.repo} as {done.tag} (commit {done.commit[:12]}): {', '.join(done.changed)}")
    else:
        print(f"{done.repo} already holds this as {done.tag}: nothing to commit.")


if __name__ == "__main__":
    sys.exit(cli.main(["tokens", "publish", *sys.argv[1:]]))
