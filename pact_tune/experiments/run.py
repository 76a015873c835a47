"""Carries an experiment out: stages, tuning, the grid. What is done is passed over, what was begun is gone on with.

Every command has a process of its own. On a CPU these are forked from a process that has imported everything once, which
costs nothing; where a device is used they start anew, since a device does not survive a fork.
"""

import json
import multiprocessing
import multiprocessing.process
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

from pact_tune import cli
from pact_tune.errors import UserError, printable
from pact_tune.evaluation.run import read_summary
from pact_tune.experiments.plan import Experiment, Run, Stage
from pact_tune.files import atomic_file
from pact_tune.log import progress
from pact_tune.run_state import STATE_FILE
from pact_tune.stamp import STAMP_FILE

LOG_FILE, RUN_FILE = "log.txt", "run.json"
PRELOADED = ["pact_tune.experiments.preload"]
Words = tuple[str, ...]
State = Literal["done", "begun", "to do"]


# What is there -----------------------------------------------------------------------------------------------------------


def state_of(run: Run) -> State:
    """Whether a run is done, as its files tell.

    Raises:
        UserError: its folder holds a run of other settings.
    """
    noted = _noted(run)
    if noted is None:
        return "to do"
    if (noted["train"], noted["settings"]) != (list(run.train), run.settings):
        raise UserError(
            f"'{run.folder}' holds a run of other settings ({_difference(noted['train'], run.train)}): delete the folder, or "
            "choose another output_dir."
        )
    evaluated = (run.evaluation / "summary.json").exists() and noted.get("evaluated") == list(run.evaluate)
    return "done" if trained(run) and evaluated else "begun"


def trained(run: Run) -> bool:
    """Whether the last epoch's result is there, whole."""
    return (run.result / STAMP_FILE).exists()


def _noted(run: Run) -> dict[str, Any] | None:
    try:
        return json.loads((run.folder / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"'{run.folder / RUN_FILE}' is damaged: delete the folder '{run.folder}'.") from error


def _difference(one: Sequence[str], other: Sequence[str]) -> str:
    if list(one) == list(other):
        return "a config or method that it was made from has changed"
    was, now = ([word for word in words if word not in others] for words, others in ((one, other), (other, one)))
    return f"then {shlex.join(was) or 'no more'}, now {shlex.join(now) or 'no more'}"


def note(run: Run, **more: Any) -> None:
    """Writes beside a run what it is, and what of it is done."""
    with atomic_file(run.folder / RUN_FILE) as file:
        file.write_text(
            json.dumps({"train": run.train, "settings": run.settings, **more}, indent=1) + "\n", encoding="utf-8"
        )


def training_words(run: Run) -> Words:
    """The command that trains: from the beginning, or from the state that a killed try left."""
    begun = (run.folder / STATE_FILE).exists()
    return (*run.train, "resume_from_checkpoint=True" if begun else "overwrite=True")


# Work --------------------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """Some commands, one after the other, whose output goes to one file.

    Attributes:
        name (str): for people.
        log (Path): the file.
        run (Run | None): None for a stage.
        stage (Stage | None): None for a run.
    """

    name: str
    log: Path
    run: Run | None = None
    stage: Stage | None = None

    def next(self) -> Words | None:
        """The next command; None where all is done."""
        if self.stage is not None:
            return None if self.stage.done else self.stage.words
        assert self.run is not None
        if _noted(self.run) is None or not trained(self.run):  # what lies there without a note is not ours
            return training_words(self.run)
        return None if state_of(self.run) == "done" else self.run.evaluate

    def finished(self, words: Words) -> None:
        """Notes a command that ended well."""
        if self.stage is not None:
            self.stage.note()
        elif self.run is not None and words == self.run.evaluate:
            note(self.run, evaluated=self.run.evaluate)


def work(jobs: Sequence[Job], slots: int, title: str, device: str, processes: int = 1) -> None:
    """Carries jobs out, several at a time; one that fails does not stop the others.

    Args:
        jobs (Sequence[Job]): each with at least one command.
        slots (int): how many at a time.
        title (str): of the progress bar.
        device (str): of the commands.
        processes (int): of each command; on GPUs each has one of its own.

    Raises:
        UserError: there are not enough GPUs; or some failed: says which, and where their output is.
    """
    context, devices = _context(device), _devices(device)
    if devices and processes > len(devices):
        raise UserError(f"'processes' is {processes}, and there are {len(devices)} GPUs: lower it.")
    slots = min(slots, len(devices) // processes) if devices and processes > 1 else slots
    waiting, running, failed = deque(jobs), dict[int, tuple[Any, Job, Words, int]](), list[Job]()
    free = list(range(slots))
    with progress(total=len(jobs), desc=title, unit="run") as bar:
        try:
            while waiting or running:
                while waiting and free:
                    job, slot = waiting.popleft(), free.pop(0)
                    running |= _started(context, job, slot, _share(devices, slot, processes))
                bar.set_postfix_str(", ".join(job.name for _, job, _, _ in running.values()))
                for sentinel in wait(list(running)):
                    assert isinstance(sentinel, int)
                    process, job, words, slot = running.pop(sentinel)
                    process.join()
                    if process.exitcode == 0:
                        job.finished(words)
                    if job.next() not in (None, words):
                        running |= _started(context, job, slot, _share(devices, slot, processes))
                        continue
                    free.append(slot)
                    bar.update(1)
                    if job.next() is not None:  # the command failed, or did not leave what it should have
                        failed.append(job)
                        if job.stage is not None:
                            waiting.clear()
        except KeyboardInterrupt:
            for process, *_ in running.values():
                _terminate(process)
            for process, *_ in running.values():
                process.join()
            raise
    if failed:
        shown = "".join(f"\n  {job.name}: {_last_line(job.log)} ({job.log})" for job in failed)
        raise UserError(f"{len(failed)} of {len(jobs)} failed; the same command tries them again:{shown}")


def _context(device: str) -> Any:
    if device != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _terminate(process: Any) -> None:
    """Ends a command and what it has started; one that has not yet a session of its own has started nothing."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        process.terminate()


def _started(context: Any, job: Job, slot: int, gpus: str | None) -> dict[int, tuple[Any, Job, Words, int]]:
    """Starts a job's next command."""
    words = job.next()
    assert words is not None
    if job.run is not None and words != job.run.evaluate:
        note(job.run)
    process = context.Process(target=_child, args=(words, str(job.log), gpus))
    process.start()
    return {process.sentinel: (process, job, words, slot)}


def _devices(device: str) -> list[str]:
    """The GPUs that this process may use; none where commands run elsewhere."""
    if device != "cuda":
        return []
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _share(devices: Sequence[str], slot: int, processes: int) -> str | None:
    """The GPUs of a slot, as many as a command has processes: slots take turns."""
    if not devices:
        return None
    first = slot * processes % len(devices)
    return ",".join([*devices, *devices][first : first + processes])


def _child(words: Words, log: str, gpus: str | None) -> None:
    """Runs one command in this process, which was made for it; ends when the experiment's own process is gone."""
    os.setsid()  # Ctrl-C is for the experiment, which ends its runs
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(execute(words))


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Waits for the end of the experiment's process, and then ends this one as Ctrl-C does: a training saves its state."""
    parent.join()
    os.killpg(0, signal.SIGTERM)


def execute(words: Words) -> int | str | None:
    """Runs a command of this environment: ``pact`` in this process, anything else in one of its own."""
    print("$", shlex.join(words), flush=True)
    program, *arguments = words
    if program == "pact":
        return cli.main(arguments)
    return subprocess.run([sys.executable if program == "python" else program, *arguments]).returncode


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return printable(lines[-1]) if lines else "it wrote nothing"


# The whole ---------------------------------------------------------------------------------------------------------------


def all_stages(experiment: Experiment) -> list[Stage]:
    """The file's stages and the evaluations of the aligned model, in order."""
    return [*experiment.stages, *dict.fromkeys(experiment.initial_stage(case) for case in experiment.cases)]


def stage_jobs(experiment: Experiment) -> list[Job]:
    """Stages that are not done."""
    todo = [(number, stage) for number, stage in enumerate(all_stages(experiment), 1) if not stage.done]
    logs = experiment.tables / "stages"
    return [Job(f"stage {number}", logs / f"{number}.txt", stage=stage) for number, stage in todo]


def run_jobs(runs: Iterable[Run]) -> list[Job]:
    """Runs that are not done, each once."""
    by_name = {run.name: run for run in runs}
    return [Job(run.name, run.folder / LOG_FILE, run=run) for run in by_name.values() if state_of(run) != "done"]


def tuning_runs(experiment: Experiment) -> list[Run]:
    """All runs that settings are chosen by."""
    return [run for method in experiment.methods for run in experiment.tuning_runs(method).values()]


def grid_runs(experiment: Experiment, chosen: Mapping[str, Words]) -> list[Run]:
    """All runs of the tables, the first seed of every row before the second of any."""
    rows = [experiment.runs_of(case, method, chosen) for case, method in experiment.grid()]
    return [run for seed in zip(*rows, strict=True) for run in seed]


@dataclass(frozen=True)
class Numbers:
    """What a setting is chosen by, in percent."""

    accuracy: float
    asr: float
    broken: float
    refused: float

    @property
    def cost(self) -> float:
        return self.asr + self.broken + self.refused


def numbers(run: Run) -> Numbers:
    """Means over the benchmarks of each kind."""
    entries = read_summary(run.evaluation)["benchmarks"].values()

    def mean(kind: str, *counted: str) -> float:
        shares = [sum(e["counts"][c] for c in counted) / e["rows"] for e in entries if e["kind"] == kind]
        return 100 * sum(shares) / len(shares) if shares else 0.0

    return Numbers(
        mean("task", "correct"), mean("harmful", "harm"), mean("harmful", "broken"), mean("benign", "refused", "broken")
    )


def tuned(experiment: Experiment) -> dict[str, dict[Words, Numbers]]:
    """What the runs for tuning have shown: method -> settings -> numbers.

    Raises:
        UserError: a run is missing.
    """
    found: dict[str, dict[Words, Numbers]] = {}
    for method in experiment.methods:
        runs = experiment.tuning_runs(method)
        if missing := [run.name for run in runs.values() if state_of(run) != "done"]:
            raise UserError(f"Tuning is not finished ({missing[0]}): run `pact experiment {experiment.file}` first.")
        if runs:
            found[method.name] = {words: numbers(run) for words, run in runs.items()}
    return found


def choose(experiment: Experiment) -> dict[str, Words]:
    """Settings by method, as overrides; methods without anything to choose are left out.

    Raises:
        UserError: a run for tuning is missing.
    """
    found = tuned(experiment)
    if not found:
        return {}
    best = max(n.accuracy for settings in found.values() for n in settings.values())
    tolerance = experiment.settings["tuning"]["tolerance"]
    return {name: _chosen(settings, best, tolerance) for name, settings in found.items()}


def _chosen(settings: dict[Words, Numbers], best: float, tolerance: float) -> Words:
    """See :class:`pact_tune.experiments.plan.TuningSettings`; the first of equals."""
    own = max(n.accuracy for n in settings.values())
    bar = (best if own >= best - tolerance else own) - tolerance
    good = {words: n for words, n in settings.items() if n.accuracy >= bar}
    return min(good, key=lambda words: (good[words].cost, -good[words].accuracy))
