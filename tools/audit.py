"""pact audit: which training rows would the aligned model itself have refused?"""

import shutil
import sys
from pathlib import Path

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.environment import install
from pact_tune.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Audits data and writes one verdict a row.

    Args:
        argv (list[str] | None): arguments; default: those of the process.
    """
    parser = Parser(
        prog="pact audit",
        description="The aligned model answers the prompt of each training row, and a judge says whether it refuses. Prints "
        "a table by source and writes a JSONL with a verdict a row, the rows most at odds with the aligned model first. Give "
        "the file to training as dataset.audit.",
    )
    parser.add_argument(
        "data", nargs="+", metavar="DATA", help="files, or names of data sets, as a config's dataset.source"
    )
    parser.add_argument("--aligned", required=True, metavar="MODEL", help="folder or Hub name of the aligned model")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--columns", nargs="+", default=[], metavar="KEY=COLUMN", help="as a config's dataset.columns")
    parser.add_argument("--name", help="configuration of a Hub data set")
    parser.add_argument("--split", help="split of a Hub data set")
    parser.add_argument("--judge", default="phrases", help="phrases (default), or MODULE:CLASS")
    parser.add_argument("--answer-tokens", type=int, default=12, help="of the aligned model's answer (default: 12)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N rows of the output as well")
    parser.add_argument(
        "--tokens-per-batch", type=int, default=8192, help="padded tokens of a forward pass (default: 8192)"
    )
    parser.add_argument("--device", help="default: a GPU where there is one")
    args = parser.parse_args(argv)
    if min(args.answer_tokens, args.tokens_per_batch) < 1 or args.show < 0:
        raise UserError("--answer-tokens and --tokens-per-batch must be at least 1, --show 0.")
    if args.output.suffix != ".jsonl":
        raise UserError(f"--output is '{args.output}'; give the name of a .jsonl file.")
    if args.judge in ("llama-guard", "rubric"):
        raise UserError(f"--judge is '{args.judge}', which the audit does not take: give phrases, or MODULE:CLASS.")
    columns = dict(part.partition("=")[::2] for part in args.columns)
    if not all(columns.values()):
        raise UserError("--columns takes KEY=COLUMN, such as prompt=ask response=reply.")
    try:
        from pact_tune.evaluation import audit, judges
        from pact_tune.evaluation.answering import Local
    except ImportError as error:
        raise UserError(f"The audit needs scipy ({error}): {install('eval')}.") from error
    audit.check_output(args.output)
    import transformers

    from pact_tune.data import audited_rows
    from pact_tune.run_lock import run_lock

    transformers.utils.logging.disable_progress_bar()  # of loading weights
    rows = []
    for source in args.data:
        found, counts = audited_rows(source, args.name, args.split, columns or None)
        print(counts, flush=True)
        rows += found
    if not rows:
        raise UserError("No row has a response, so there is nothing to audit.")
    judge = judges.load(args.judge)
    aligned = Local(args.aligned, device=args.device, tokens_per_batch=args.tokens_per_batch)
    work = args.output.with_suffix(".work")
    with run_lock(work):
        records = audit.audit(rows, aligned, judge, work, answer_tokens=args.answer_tokens)
        settings = aligned.settings | {"judge": judge.settings, "answer_tokens": args.answer_tokens}
        audit.write(args.output, records, settings)
    shutil.rmtree(work)
    print(audit.table(records))
    for record in records[: args.show]:
        print(f"\n{record['verdict']} ({record['odds']:+.2f} nats) {record['source']} {record['place']}")
        print(
            f"  prompt:   {record['prompt'][:200]!r}\n  response: {record['response'][:200]!r}\n  aligned:  {record['answer']!r}"
        )
    print(f"\nVerdicts: {args.output}; train with dataset.audit.file={args.output} dataset.audit.action=drop")


if __name__ == "__main__":
    sys.exit(cli.main(["audit", *sys.argv[1:]]))
