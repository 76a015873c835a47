"""pact experiment: a grid of runs, each trained and evaluated in a folder of its own, and one table of them all."""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from pact_tune import cli
from pact_tune.arguments import Parser
from pact_tune.errors import UserError

if TYPE_CHECKING:
    from pact_tune.experiments.plan import Experiment
    from pact_tune.experiments.run import Job


def main(argv: list[str] | None = None) -> int:
    """Runs an experiment, or says what it would run.

    Args:
        argv (list[str] | None): arguments; default: those of the process.

    Returns:
        int: exit code.

    Raises:
        UserError: the file is not right, or something failed.
    """
    parser = Parser(
        prog="pact experiment",
        description="Methods x cases x poison shares x seeds: makes what the file's stages make, chooses each method's settings "
        "on a seed that is not reported, trains and evaluates every run in a folder of its own, and writes one table. What is "
        "done is passed over and what was begun is gone on with: to resume, give the same command again.",
    )
    parser.add_argument("file", metavar="FILE", help="a path, or a name that `pact ls` lists")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="run these seeds alone; the same command without it goes on with the file's",
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time on this machine (default: 1)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="check the file and show what would be run")
    instead.add_argument(
        "--submit", metavar="CMD",
        help="hand each run to a queue instead: CMD is called once a run with one more argument, the run's command line "
        "(\"sbatch --gpus 1 --wrap\"). Stages, tuning and the grid are handed over one after the other: give the command "
        "again when a part is through, and at last for the table",
    )  # fmt: skip
    instead.add_argument("--run", metavar="NAME", help="this run alone (\"stages\": the stages), as --submit hands it over")  # fmt: skip
    args = parser.parse_args(argv)
    jobs = 1 if args.jobs is None else args.jobs
    if jobs < 1:
        raise UserError(f"--jobs is {jobs}; it must be at least 1.")
    if args.jobs is not None and (args.dry_run or args.submit or args.run):
        raise UserError("--jobs is for runs on this machine: leave it out with --dry-run, --submit and --run.")
    from pact_tune.experiments import plan

    experiment = plan.read(args.file, args.seeds)
    if args.dry_run:
        return _show(experiment)
    elsewhere = args.run or args.submit  # a queue's machines have files of their own
    if not elsewhere and (missing := _missing(experiment)):
        raise UserError(
            f"'{experiment.file}' reads what is neither there nor made by one of its stages: {', '.join(missing)}; correct the "
            "paths, or get it first."
        )
    with _interruptible():
        if args.run:
            return _one(experiment, args.run)
        return _submit(experiment, args) if args.submit else _all(experiment, jobs)


def _all(experiment: "Experiment", jobs: int) -> int:
    """Everything, on this machine."""
    from pact_tune.experiments import results, run
    from pact_tune.run_lock import run_lock

    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    with run_lock(experiment.tables):
        for title, found in _parts(experiment):
            if found:
                print(f"{title}: {len(found)} to do, in {experiment.output}", flush=True)
                slots = 1 if found[0].stage else jobs  # a stage may need the one before
                run.work(
                    found, slots, title, experiment.device, 1 if found[0].stage else experiment.settings["processes"]
                )
        chosen = run.choose(experiment)
        paths = results.write(experiment, chosen)
        for case in experiment.cases:
            print(f"\n{case.title or experiment.settings['title']}\n{results.compare(experiment, case, chosen).text()}")
        print(f"\nTables: {', '.join(map(str, paths))}")
    return 0


def _parts(experiment: "Experiment") -> Iterator[tuple[str, list["Job"]]]:
    """Jobs that are to be done, part by part; a part is looked at when the one before it is done."""
    from pact_tune.experiments import run

    yield "Stages", run.stage_jobs(experiment)
    yield "Tuning", run.run_jobs(run.tuning_runs(experiment))
    yield "Runs", run.run_jobs(run.grid_runs(experiment, run.choose(experiment)))


def _missing(experiment: "Experiment") -> list[str]:
    """What is neither there nor made by a stage; the settings that tuning chooses name no files."""
    from pact_tune.experiments import inputs, run

    return inputs.missing(run.all_stages(experiment), [*run.tuning_runs(experiment), *run.grid_runs(experiment, {})])


def _submit(experiment: "Experiment", args: argparse.Namespace) -> int:
    """Hands the first part that is not done to a queue."""
    words = _words(args.submit)
    seeds = [] if args.seeds is None else ["--seeds", *map(str, args.seeds)]
    for title, found in _parts(experiment):
        if not found:
            continue
        names = ["stages"] if found[0].stage else [job.name for job in found]
        pact = str(Path(sys.executable).parent / "pact")
        for name in names:
            command = [pact, "experiment", args.file, *seeds, "--run", name]
            line = f"cd {shlex.quote(os.getcwd())} && {shlex.join(command)}"
            if subprocess.run([*words, line]).returncode:
                raise UserError(
                    f"`{shlex.join(words)}` did not take '{name}' (see above); the runs before it are handed over."
                )
        print(f"{title}: {len(names)} handed over. When they are through, give this command again.")
        return 0
    return _all(experiment, 1)


def _words(text: str) -> list[str]:
    """Words of --submit."""
    from pact_tune.experiments import plan

    words = plan.split(text, "--submit")
    if not words:
        raise UserError("--submit is empty; give a command such as \"sbatch --wrap\".")  # fmt: skip
    return words


def _one(experiment: "Experiment", name: str) -> int:
    """One run, or the stages."""
    from pact_tune.errors import unknown_key
    from pact_tune.experiments import run

    if name == "stages":
        found = run.stage_jobs(experiment)
    else:
        runs = run.tuning_runs(experiment)
        if name not in {one.name for one in runs}:
            runs += run.grid_runs(experiment, run.choose(experiment))
        if name not in {one.name for one in runs}:
            raise unknown_key(name, ["stages", *(one.name for one in runs)], "--run")
        found = run.run_jobs(one for one in runs if one.name == name)
    if not found:
        print(f"{name} is done.")
        return 0
    run.work(found, 1, name, experiment.device, experiment.settings["processes"])
    return 0


def _show(experiment: "Experiment") -> int:
    """What would be run, as commands."""
    from pact_tune.experiments import run

    stages = run.all_stages(experiment)
    tuning = run.tuning_runs(experiment)
    try:
        chosen = run.choose(experiment)
    except UserError:  # not tuned yet
        chosen = {}
    runs = list({one.name: one for one in run.grid_runs(experiment, chosen)}.values())
    for stage in stages:
        print(f"# stage, {'done' if stage.done else 'to do'}\n{shlex.join(stage.words)}")
    for title, found in (("tuning", tuning), ("run", runs)):
        for one in found:
            print(f"# {title} {one.name}, {run.state_of(one)}")
            print(f"{shlex.join(run.training_words(one))}\n{shlex.join(one.evaluate)}")
    if tuning and not chosen:
        print("# The runs will have the settings that tuning chooses as well.")
    print(f"# {len(stages)} stages, {len(tuning)} runs for tuning, {len(runs)} runs, all below {experiment.output}")
    if missing := _missing(experiment):
        print(f"# Warning: neither there nor made by a stage, so it would not start: {', '.join(missing)}")
    return 0


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the experiment as Ctrl-C does: its runs save their state."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(cli.main(["experiment", *sys.argv[1:]]))
