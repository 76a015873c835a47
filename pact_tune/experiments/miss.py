"""An audit that misses some of what it found, to learn how a method fares with a worse one.

python -m pact_tune.experiments.miss audit.jsonl --share 0.5 --output half.jsonl
"""

import argparse
import json
import random
from pathlib import Path

from pact_tune.files import atomic_file


def miss(lines: list[str], share: float, seed: int = 0) -> list[str]:
    """Lines of `pact audit`'s output with a share of the refused rows said to have been answered.

    Args:
        lines (list[str]): the file's lines, its head first.
        share (float): of the refused rows, from 0 to 1.
        seed (int): of the drawing.

    Returns:
        list[str]: as many lines.
    """
    head, *rows = lines
    records = [json.loads(row) for row in rows]
    refused = [record for record in records if record["verdict"] == "refused"]
    for record in random.Random(seed).sample(refused, round(share * len(refused))):
        record["verdict"] = "answered"
    return [head, *(json.dumps(record, ensure_ascii=False) for record in records)]


def main(argv: list[str] | None = None) -> None:
    """Command line: the audit, the share that is missed, and the file to write."""
    parser = argparse.ArgumentParser(prog="python -m pact_tune.experiments.miss", description=__doc__)
    parser.add_argument("audit", type=Path)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    lines = miss(args.audit.read_text(encoding="utf-8").splitlines(), args.share, args.seed)
    with atomic_file(args.output) as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
