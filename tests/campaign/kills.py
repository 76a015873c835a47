"""SIGKILL at random moments of training, saving, filling, computing, merging, publishing and downloading; then going on.

    python -m tests.campaign.kills [--kills N]

After each kill, whatever lies under its own name must be whole. In the end the result must have the bits of one that was
never killed, and nothing else may be left. Counted are the kills: right, traceback (going on failed, or was refused) and
silent (other bits, a half of something, a leftover).
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hub_server
from huggingface_hub import constants
from recipe import write_workspace
from tiny import tiny_model

from pact_tune.errors import UserError
from pact_tune.files import leftovers
from pact_tune.log import progress
from pact_tune.reference import cache
from pact_tune.safety_tokens import FILES, SafetyTokens
from pact_tune.stamp import check_files, read_stamp
from tests.campaign.processes import Command, Done, Tally, carry_out, run, train

REPO, MODEL = "tester/tokens", "model-a"


class Work:
    """Something that takes a while, can be killed, and is gone on with by a command.

    Args:
        folder (Path): with a workspace (:func:`recipe.write_workspace`); the work's own files go below it.
        name (str): of this try; "whole" is never killed.
    """

    #: kills of one try before it may end
    kills = 3

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.out = folder / type(self).__name__ / name
        self.out.parent.mkdir(exist_ok=True)
        self.log = self.out.parent / f"{name}.log"
        self.config = folder / "config.yaml"

    def words(self) -> list[str]:
        """The command that starts the work, or goes on with it."""
        raise NotImplementedError

    def result(self) -> dict[str, bytes]:
        """What must be the same in the end."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Is called in the command's process."""

    def moments(self) -> int:
        """How far it has come, as seen from outside; kills fall where this grows."""
        return 0

    def check(self) -> str:
        """What is half there; "" when nothing is."""
        return ""


class Training(Work):
    """Two epochs, a state after each step; killed by the clock."""

    def words(self) -> list[str]:
        state = (self.out / "recipe_state.pt").exists()
        return train(
            self.config, f"output_dir={self.out}", "epochs=2", "save_every_n_steps=1", "batch_size=3",
            f"reference_cache.directory={self.out}.cache", f"resume_from_checkpoint={state}",
        )  # fmt: skip

    def result(self) -> dict[str, bytes]:
        files = [path for path in self.out.glob("epoch_*/**/*.safetensors")]
        return {str(path.relative_to(self.out)): path.read_bytes() for path in files}

    def check(self) -> str:
        for epoch in sorted(self.out.glob("epoch_*")):
            try:
                check_files(epoch, read_stamp(epoch))
            except UserError as error:
                return str(error)
        others = {path.name for path in self.out.glob("*")} - {"epoch_0", "epoch_1", "recipe_state.pt", "logs"}
        return f"{others} was left" if others - {".pact.lock"} - {p.name for p in leftovers(self.out)} else ""


class Saving(Training):
    """The same, killed while a state or an epoch's result is being written."""

    kills = 5

    def moments(self) -> int:
        return len(leftovers(self.out))


class Filling(Work):
    """`pact cache build`, with small shards; killed between and in shards."""

    kills = 5

    def words(self) -> list[str]:
        return ["pact", "cache", "build", str(self.config), f"reference_cache.directory={self.out}"]

    def prepare(self) -> None:
        cache.SHARD_TOKENS = 60

    def moments(self) -> int:
        return len(list(self.out.glob("*/shard-*")))

    def result(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.out.glob("*/shard-*")}

    def check(self) -> str:
        damaged = [str(path) for path in self.out.glob("*/shard-*") if cache.is_damaged(path)]
        return f"{damaged[0]} is half" if damaged else ""


class Computing(Work):
    """`pact tokens compute`; killed among responses and sums."""

    kills = 4

    def words(self) -> list[str]:
        return [
            "pact", "tokens", "compute", "--aligned", f"{self.folder}/model", "--base", f"{self.folder}/base", "--prompts",
            f"{self.folder}/rows.jsonl", "--prompt-column", "instruction", "-k", "6", "--max-response-tokens", "8",
            "--tokens-per-batch", "60", "--output", str(self.out),
        ]  # fmt: skip

    def moments(self) -> int:
        work = self.out.with_name(f"{self.name}.work")
        return sum(path.stat().st_mtime_ns for path in work.glob("[!.]*") if path.exists())

    def result(self) -> dict[str, bytes]:
        return {name: (self.out / name).read_bytes() for name in FILES}

    def check(self) -> str:
        if self.out.exists():
            try:
                SafetyTokens.load(self.out)
            except UserError as error:
                return str(error)
        return ""


class Merging(Work):
    """`pact merge`, over an earlier merge; killed anywhere."""

    kills = 4

    def words(self) -> list[str]:
        adapter = self.folder / "Training" / "whole" / "epoch_1" / "adapter"
        return ["pact", "merge", str(adapter), "--output", str(self.out)]

    def moments(self) -> int:
        return len(leftovers(self.out.parent, [self.name]))

    def result(self) -> dict[str, bytes]:
        return {"model.safetensors": (self.out / "model.safetensors").read_bytes()}

    def check(self) -> str:
        if not self.out.exists():
            return ""
        try:
            check_files(self.out, read_stamp(self.out))
        except UserError as error:
            return str(error)
        return ""


class Publishing(Work):
    """`pact tokens publish` to a Hub on localhost; killed between its requests."""

    kills = 4

    def __init__(self, folder: Path, name: str, hub: hub_server.Hub) -> None:
        super().__init__(folder, name)
        self.hub, self.repo = hub, f"tester/{name}"

    def words(self) -> list[str]:
        return ["pact", "tokens", "publish", f"{self.folder}/safety_tokens", "--repo", self.repo, "--subfolder", MODEL]

    def prepare(self) -> None:
        constants.ENDPOINT = self.hub.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = self.hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        constants.HF_HUB_OFFLINE = False
        constants.HF_HUB_CACHE = str(self.out) + ".cache"
        os.environ["HF_TOKEN"] = hub_server.TOKEN

    def moments(self) -> int:
        return len(self.hub.requests)

    def _files(self) -> dict[str, bytes]:
        repository = self.hub.repositories.get(self.repo)
        files = repository.commits[repository.log[-1]] if repository else {}
        return {path: content for path, content in files.items() if path.startswith(MODEL)}

    def result(self) -> dict[str, bytes]:
        repository = self.hub.repositories[self.repo]
        tagged = {tag: b"latest" if oid == repository.log[-1] else b"older" for tag, oid in repository.tags.items()}
        plain = {path: content.replace(self.repo.encode(), b"REPO") for path, content in self._files().items()}
        return plain | tagged

    def check(self) -> str:
        return "" if len(self._files()) in (0, 3) else f"{sorted(self._files())} is half a version"


class Downloading(Publishing):
    """`pact tokens download`; killed between its requests."""

    def words(self) -> list[str]:
        return ["pact", "tokens", "download", "tester/whole", "--subfolder", MODEL, "--output", str(self.out)]

    def result(self) -> dict[str, bytes]:
        return {name: (self.out / name).read_bytes() for name in FILES}

    def check(self) -> str:
        return Computing.check(self)  # type: ignore[arg-type]


class Moment:
    """When to kill: soon after something has appeared, or at any time.

    Args:
        work (Work): that is going on.
        seconds (float): that it takes without kills.
        rng (random.Random): decides.
    """

    def __init__(self, work: Work, seconds: float, rng: random.Random) -> None:
        self.work, self.seen = work, work.moments()
        by_the_clock = rng.random() < 0.25 or type(work).moments is Work.moments
        self.changes = 0 if by_the_clock else rng.randrange(1, 4)  # to see before
        self.wait = rng.uniform(0.05, seconds) if by_the_clock else rng.uniform(0, 0.02)
        self.at: float | None = None

    def __call__(self) -> bool:
        moments = self.work.moments()
        self.changes -= moments != self.seen
        self.seen = moments
        if self.at is None and self.changes <= 0:
            self.at = time.monotonic() + self.wait
        return self.at is not None and time.monotonic() >= self.at


def attempt(work: Work, whole: dict[str, bytes], seconds: float, rng: random.Random, tally: Tally) -> None:
    """Kills a work some times, lets it go on to its end, and compares.

    Args:
        work (Work): not begun.
        whole (dict[str, bytes]): what comes of it without kills.
        seconds (float): that it takes without kills.
        rng (random.Random): decides when.
        tally (Tally): counts each kill.
    """
    kind, kills, problem = type(work).__name__, 0, ""
    for _ in range(work.kills):
        command = Command(work.words(), work.log, work.prepare)
        if not command.kill_when(Moment(work, seconds, rng)):
            break
        kills += 1
        problem = problem or work.check()
    done = run(work.words(), work.log, work.prepare)
    finished = done.code == 0 or "nothing to resume" in done.said
    if not finished:
        verdict, said = "traceback", done.said
    elif problem or work.check() or work.result() != whole:
        verdict, said = "silent", problem or work.check() or "other bits"
    elif left := [p for p in work.out.parent.rglob(f"*{work.name}*") if ".pact.partial" in p.name]:
        verdict, said = "silent", f"{left[0]} was left"
    else:
        verdict, said = "right", ""
    for _ in range(max(kills, 1)):
        tally.add(kind, verdict, work.name, said)


KINDS = (Training, Saving, Filling, Computing, Merging, Publishing, Downloading)


def campaign(folder: Path, kills: int, seed: int = 0, kinds: Sequence[type[Work]] = KINDS) -> Tally:
    """Kills every kind of work.

    Args:
        folder (Path): empty; everything is written there.
        kills (int): about how many a kind.
        seed (int): of the moments.
        kinds (Sequence[type[Work]]): which, in this order; merging takes what training has made.

    Returns:
        Tally: of the kills.
    """
    write_workspace(folder, rows=12)
    tiny_model(folder / "base", seed=7)
    tally = Tally("kills")
    with hub_server.serve() as hub:
        for kind in kinds:
            more = (hub,) if issubclass(kind, Publishing) else ()
            first = kind(folder, "whole", *more)
            done = _whole(first)
            rng = random.Random(f"{seed} {kind.__name__}")
            number = tried = 0
            with progress(total=kills, desc=f"Kills, {kind.__name__}", unit="kill") as bar:
                while tried < kills:
                    number += 1
                    attempt(kind(folder, f"try{number}", *more), first.result(), done.seconds, rng, tally)
                    bar.update(sum(tally.kinds[kind.__name__].values()) - tried)
                    tried = sum(tally.kinds[kind.__name__].values())
            print(
                f"{kind.__name__}: {dict(tally.kinds[kind.__name__])} ({done.seconds:.1f} s without kills)", flush=True
            )
    return tally


def _whole(work: Work) -> Done:
    done = run(work.words(), work.log, work.prepare)
    assert done.code == 0, done.said
    return done


def main(argv: list[str] | None = None) -> int:
    """Runs the campaign; exit code 1 when anything was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each kind of work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], help="only these; Merging needs Training before it")

    def chosen(folder: Path, args: argparse.Namespace) -> Tally:
        kinds = [kind for kind in KINDS if not args.kinds or kind.__name__ in args.kinds]
        return campaign(folder, args.kills, args.seed, kinds)

    return carry_out(parser, argv, chosen)


if __name__ == "__main__":
    sys.exit(main())
