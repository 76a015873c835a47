"""`pact env`: versions, devices, and what is missing for which feature."""

import json
import sys
from dataclasses import asdict

from pact_tune import cli, environment
from pact_tune.arguments import Parser


def main(argv: list[str] | None = None) -> int:
    """Prints what is installed, for people or as JSON: the first thing to put into a report of a fault.

    Args:
        argv (list[str] | None): the command line after `pact env`.

    Returns:
        int: 0; a missing feature is no error.
    """
    parser = Parser(prog="pact env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    versions, devices, features = environment.versions(), environment.devices(), list(environment.features())
    if args.json:
        report = {"versions": versions, "devices": devices, "features": [asdict(feature) for feature in features]}
        print(json.dumps(report, indent=2))
        return 0
    for name, version in versions.items():
        print(f"{name:<18} {version}")
    print(f"{'devices':<18} {'; '.join(devices)}\n")
    for feature in features:
        print(f"{'missing' if feature.problems else 'ok':<8} {feature.name}")
        if feature.problems:
            print(f"{'':<8} {'; '.join(feature.problems)}: {feature.mend}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["env", *sys.argv[1:]]))
