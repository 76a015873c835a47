"""All campaigns, one after the other, or a small sample of each; about fifteen minutes on two quiet cores.

python -m tests.campaign [--small]
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from pact_tune import log
from tests.campaign import bad_configs, damage, disks, kills
from tests.campaign.processes import OUTPUT, Tally

SMALL_FILES = ("pact.json", "recipe_state.pt", "cache shard")
SMALL_KILLS = (kills.Saving, kills.Publishing)


def main(argv: list[str] | None = None) -> int:
    """Runs them; exit code 1 when anything was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0, help="of places and moments")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the tables")
    args = parser.parse_args(argv)
    log.setup()
    os.environ["HF_HUB_OFFLINE"] = "1"
    kinds = tuple(kind for kind in damage.KINDS if not args.small or kind.name in SMALL_FILES)
    tallies: list[Tally] = []
    for campaign in (
        lambda folder: kills.campaign(
            folder, 1 if args.small else 20, args.seed, SMALL_KILLS if args.small else kills.KINDS
        ),
        lambda folder: damage.campaign(folder, 2 if args.small else 15, args.seed, kinds),
        lambda folder: disks.campaign(folder, 1 if args.small else 10, args.seed, not args.small),
        lambda folder: bad_configs.campaign(folder, 120 if args.small else 1, 1 if args.small else 60),
    ):
        with tempfile.TemporaryDirectory() as name:
            tallies.append(campaign(Path(name)))
    return int(any([tally.report(args.output) for tally in tallies]))


if __name__ == "__main__":
    sys.exit(main())
