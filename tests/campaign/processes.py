"""Commands as a user types them, each in a fork of this process: the imports of seconds are paid once, kills harm nobody.

The process that forks must not have trained anything itself (autograd's threads do not survive a fork).
"""

import argparse
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pact_lora_finetune  # noqa: F401  (imported before forking)
import torch
from torchtune._cli import tune

from pact_tune import cli, log

OUTPUT = Path("outputs/campaign")  # where tables are written, unless told
HANGS = 300.0  # seconds after which a command is said to hang
PREFIXES = ("pact: ", "pact_lora_finetune: ")

torch.set_num_threads(1)


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code (int): what it exited with; the negative signal's number where one killed it.
        said (str): stdout and stderr.
        seconds (float): it took.
    """

    code: int
    said: str
    seconds: float

    @property
    def verdict(self) -> str:
        """ "taken", "refused" (one sentence, or a list of them, and nothing after it) or "traceback"."""
        if self.code == 0:
            return "taken"
        return "refused" if self.code > 0 and self.message and "Traceback" not in self.said else "traceback"

    @property
    def message(self) -> str:
        """The last message of a user error, with what follows it."""
        lines = self.said.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith(PREFIXES)]
        return "\n".join(lines[starts[-1] :]).strip() if starts else ""


class Command:
    """A command at work.

    Args:
        argv (Sequence[str]): such as ["pact", "verify", "outputs/run/epoch_0"], or ["tune", "run", ...].
        log (Path): a file for what it says.
        prepare (Callable[[], object]): is called in the new process first.
    """

    def __init__(self, argv: Sequence[str], log: Path, prepare: Callable[[], object] = lambda: None) -> None:
        self.log, self.started, self.code = log, time.monotonic(), None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(list(map(str, argv)), log, prepare)

    def running(self) -> bool:
        """Whether it has not ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is None

    def wait(self) -> Done:
        """Waits for its end; one that hangs is killed."""
        while self.running():
            if time.monotonic() - self.started > HANGS:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        assert self.code is not None
        return Done(self.code, self.log.read_text(errors="replace"), time.monotonic() - self.started)

    def kill_when(self, moment: Callable[[], bool]) -> bool:
        """Kills it, with SIGKILL, at a moment; False when it ended before."""
        while self.running():
            if moment():
                os.kill(self.pid, signal.SIGKILL)
                return self.wait().code == -signal.SIGKILL
            time.sleep(0.001)
        return False


def run(argv: Sequence[str], log: Path, prepare: Callable[[], object] = lambda: None) -> Done:
    """A command from its start to its end."""
    return Command(argv, log, prepare).wait()


def train(config: Path, *overrides: str) -> list[str]:
    """The words of `tune run` for a config."""
    return ["tune", "run", "pact_lora_finetune", "--config", str(config), *map(str, overrides)]


def _become(argv: list[str], log: Path, prepare: Callable[[], object]) -> None:
    """The child's part; never returns."""
    code: int | str | None = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        prepare()
        code = _call(argv)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _call(argv: list[str]) -> int | str | None:
    if argv[0] == "pact":
        return cli.main(argv[1:])
    sys.argv = argv
    tune.main()
    return 0


def carry_out(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    campaign: Callable[[Path, argparse.Namespace], "Tally"],
) -> int:
    """One campaign by its command line, in a folder of its own; exit code 1 when anything was not right.

    Args:
        parser (argparse.ArgumentParser): of what the campaign asks for; where its table goes is added.
        argv (Sequence[str] | None): arguments; default: those of the process.
        campaign (Callable): given an empty folder and the arguments.
    """
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the table")
    args = parser.parse_args(argv)
    log.setup()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        return campaign(Path(name), args).report(args.output)


class Tally:
    """Counts: tried, right, traceback, silent; and what each try yielded."""

    def __init__(self, name: str) -> None:
        self.name, self.counts = name, Counter()
        self.kinds: dict[str, Counter] = {}
        self.tries: list[tuple[str, str, str, str]] = []

    def add(self, kind: str, verdict: str, what: str = "", said: str = "") -> None:
        """Counts one try.

        Args:
            kind (str): row of the table.
            verdict (str): "right", "traceback" or "silent".
            what (str): what was done.
            said (str): what came of it.
        """
        self.counts[verdict] += 1
        self.kinds.setdefault(kind, Counter())[verdict] += 1
        self.tries.append((verdict, kind, what, " ".join(said[-1500:].split())))

    @property
    def wrong(self) -> list[str]:
        """A line for each try that was not right."""
        return [f"{verdict}: {kind}, {what}: {said}" for verdict, kind, what, said in self.tries if verdict != "right"]

    def table(self) -> str:
        """Markdown."""
        rows = [f"| {self.name} | tried | right | traceback | silent |", "|---|---|---|---|---|"]
        for kind, counts in [*self.kinds.items(), ("all", self.counts)]:
            numbers = (sum(counts.values()), counts["right"], counts["traceback"], counts["silent"])
            rows.append(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")
        return "\n".join(rows)

    def all_tries(self) -> str:
        """Markdown: what each try yielded, the wrong ones first."""
        rows = ["| verdict | kind | input | said |", "|---|---|---|---|"]
        for cells in sorted(self.tries, key=lambda one: one[0] == "right"):
            rows.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(rows)

    def report(self, folder: Path) -> int:
        """Prints the table and what went wrong, and writes both, and what each try yielded, to a file.

        Args:
            folder (Path): of the file; made where it is missing.

        Returns:
            int: 1 if anything went wrong.
        """
        file = folder / f"{self.name.replace(' ', '_')}.md"
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{self.table()}\n\n{self.all_tries()}\n")
        print(f"\n{self.table()}\n", flush=True)
        for line in self.wrong[:40]:
            print(line, flush=True)
        print(f"What each try yielded: {file}", flush=True)
        return int(bool(self.wrong))
