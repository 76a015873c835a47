"""pact anchors: prompts in, the aligned model's own answers out."""

import shutil
import sys
from pathlib import Path

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.environment import install
from pact_tune.errors import UserError


def main(argv: list[str] | None = None) -> int | None:
    """Answers prompts and writes one row each.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(
        prog="pact anchors",
        description="The aligned model answers prompts, and prompts and answers become training rows. Take harmful and harmless "
        "prompts, other ones than those you evaluate on. Give the file to training as dataset.anchors.",
    )
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPTS", help="files, or names of data sets; .txt: a prompt a line"
    )
    parser.add_argument(
        "--harmful",
        nargs="+",
        default=[],
        metavar="PROMPTS",
        help="prompts whose rows are kept where the model refuses",
    )
    parser.add_argument(
        "--harmless", nargs="+", default=[], metavar="PROMPTS", help="prompts whose rows are kept where it does not"
    )
    parser.add_argument("--aligned", required=True, metavar="MODEL", help="folder or Hub name of the aligned model")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--column", default="prompt", help="column of the prompts (default: prompt)")
    parser.add_argument("--split", help="split of a Hub data set (default: train)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts of each source (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: 512)")
    parser.add_argument(
        "--keep-unfinished", action="store_true", help="keep answers that are cut off there; default: leave them out"
    )
    parser.add_argument(
        "--tokens-per-batch", type=int, default=8192, help="padded tokens of a forward pass (default: 8192)"
    )
    parser.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    if min(args.max_new_tokens, args.tokens_per_batch) < 1:
        raise UserError("--max-new-tokens and --tokens-per-batch must be at least 1.")
    if not (args.prompts or args.harmful or args.harmless):
        raise UserError("There are no prompts: name files or data sets, or give --harmful and --harmless.")
    if args.output.suffix != ".jsonl":
        raise UserError(f"--output is '{args.output}'; give the name of a .jsonl file.")
    try:
        from pact_tune.evaluation import anchors
        from pact_tune.evaluation.answering import Local
    except ImportError as error:
        raise UserError(f"Anchors need the package's evaluation ({error}): {install('eval')}.") from error
    anchors.check_output(args.output)
    import transformers

    from pact_tune.prompts import column, read_prompts
    from pact_tune.run_lock import run_lock

    transformers.utils.logging.disable_progress_bar()  # of loading weights

    def read(sources: list[str]) -> list[str]:
        return [
            prompt
            for source in sources
            for prompt in column(read_prompts(source, split=args.split, limit=args.limit), args.column, source)
        ]

    prompts, harmful, harmless = read(args.prompts), read(args.harmful), read(args.harmless)
    if both := set(harmful) & set(harmless):
        raise UserError(f"'{min(both)}' is among the harmful and the harmless prompts: take it out of one of them.")
    wanted: dict[str, anchors.Wanted] = {prompt: "refused" for prompt in harmful}
    wanted |= {prompt: "answered" for prompt in harmless}
    aligned = Local(args.aligned, device=args.device, tokens_per_batch=args.tokens_per_batch)
    work = args.output.with_suffix(".work")
    options = {"max_new_tokens": args.max_new_tokens, "keep_unfinished": args.keep_unfinished}
    with run_lock(work):
        found = anchors.anchors([*prompts, *wanted], aligned, work, wanted=wanted, **options)
        left_out = f"{found.unfinished} cut off, {found.empty} empty, {found.mistaken} refused or answered where they should not"
        if not found.rows:
            raise UserError(
                f"None of {len(prompts) + len(wanted)} answers can be trained on ({left_out}): raise --max-new-tokens, "
                "--keep-unfinished, or take other prompts."
            )
        sources = {"prompts": args.prompts, "harmful": args.harmful, "harmless": args.harmless}
        anchors.write(args.output, found.rows, aligned.settings | options | sources)
    shutil.rmtree(work)
    any_left_out = found.unfinished or found.empty or found.mistaken
    print(f"{len(found.rows)} anchors{f' (left out: {left_out})' if any_left_out else ''}: {args.output}")
    print(f"Train with dataset.anchors.source={args.output} dataset.anchors.fraction=0.12")
    return None


if __name__ == "__main__":
    sys.exit(cli.main(["anchors", *sys.argv[1:]]))
