"""Full and read-only disks, and two processes that want one folder.

    python -m tests.campaign.disks [--times N]

Disks are small tmpfs mounts, so it needs the right to mount (`sudo`, or `unshare -rm python -m ...`); without it only the
company is tried. Right is one sentence with nothing half-written, and the bits of an undisturbed run once there is room
again; or, with company, one of two that goes on undisturbed.
"""

import argparse
import contextlib
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from recipe import write_workspace

from pact_tune.log import progress
from pact_tune.reference import cache
from tests.campaign.kills import Filling
from tests.campaign.processes import Command, Done, Tally, carry_out, run, train

SIZE = 4_000_000  # bytes of a small disk


@contextlib.contextmanager
def disk(folder: Path, size: int = SIZE) -> Iterator[Path]:
    """A small file system, mounted at a new folder."""
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, capture_output=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def may_mount(folder: Path) -> bool:
    """Whether this process has the right to mount."""
    try:
        with disk(folder / "try"):
            return True
    except subprocess.CalledProcessError:
        (folder / "try").rmdir()
        return False


def fill_up(place: Path, left: int) -> None:
    """Leaves so many bytes free on a disk, more or less."""
    with contextlib.suppress(OSError), (place / "ballast").open("wb", buffering=0) as file:
        file.write(bytes(max(0, shutil.disk_usage(place).free - left)))


def read_only(place: Path) -> None:
    """Makes a disk read-only."""
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)


def adapter(folder: Path) -> bytes:
    """The last epoch's."""
    return (folder / "epoch_1" / "adapter" / "adapter_model.safetensors").read_bytes()


class Disks:
    """All cases; each counts itself.

    Args:
        folder (Path): empty; everything is written there.
        seed (int): of moments and sizes.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.log, self.rng = folder, folder / "said.txt", random.Random(seed)
        self.tally = Tally("disks and company")
        self.config = write_workspace(folder, rows=12)
        self.train = lambda out, *more: train(
            self.config, f"output_dir={out}", f"reference_cache.directory={folder}/cache", "epochs=2", *more
        )
        first = run(self.train(folder / "whole"), self.log)
        assert first.code == 0, first.said
        self.seconds, self.adapter = first.seconds, adapter(folder / "whole")
        self.number = 0

    def place(self) -> Path:
        """A name that nothing has."""
        self.number += 1
        return self.folder / f"place{self.number}"

    def add(self, kind: str, done: Done, right: bool, what: str = "") -> None:
        """Counts a command that had to be refused, or had to work, by what ``right`` says of it."""
        verdict = "traceback" if done.verdict == "traceback" else "right" if right else "silent"
        self.tally.add(kind, verdict, what, done.message or done.said)

    # Disks -----------------------------------------------------------------------------------------------------------

    def full_at_the_start(self) -> None:
        """Every command that writes, on a disk without room."""
        adapter_folder = self.folder / "whole" / "epoch_1" / "adapter"
        for name, words in {
            "run": lambda d: self.train(d / "out"),
            "cache build": lambda d: ["pact", "cache", "build", self.config, f"reference_cache.directory={d}/cache"],
            "merge": lambda d: ["pact", "merge", adapter_folder, "--output", d / "out"],
            "from-templates": lambda d: [
                "pact", "tokens", "from-templates", "--tokenizer", self.folder / "model", "--output", d / "out"
            ],
            "cp": lambda d: ["pact", "cp", "demo/pact_lora", d / "out.yaml"],
        }.items():  # fmt: skip
            for forbidden in (False, True):
                with disk(self.place()) as place:
                    if forbidden:
                        read_only(place)
                    else:
                        fill_up(place, 0)
                    done = run(words(place), self.log)
                    files = [path for path in place.rglob("*") if path.is_file() and path.name != "ballast"]
                    right = done.verdict == "refused" and not files and str(place) in done.message
                    self.add("read-only" if forbidden else "full at the start", done, right, f"{name}, left: {files}")

    def full_during_a_run(self) -> None:
        """The disk of the results fills up at some moment; then there is room, and the run goes on."""
        with disk(self.place()) as place:
            command = Command(self.train(place / "out", "save_every_n_steps=1"), self.log)
            time.sleep(self.rng.uniform(0.2, self.seconds))
            fill_up(place, self.rng.choice([0, 5_000, 50_000, 150_000]))
            done = command.wait()
            (place / "ballast").unlink()
            what = done.message or "finished"
            if done.code and done.verdict != "traceback":
                state = (place / "out" / "recipe_state.pt").exists()
                again = self.train(place / "out", "save_every_n_steps=1", f"resume_from_checkpoint={state}")
                done = run(again, self.log)
            right = done.code == 0 and adapter(place / "out") == self.adapter
            self.add("full during a run", done, right, what)

    def full_during_a_fill(self) -> None:
        """The same with the disk of the cache."""
        with disk(self.place()) as place:
            words = self.train(self.place(), f"reference_cache.directory={place}")
            command = Command(words, self.log, _small_shards)
            while command.running() and not list(place.glob("*/shard-*")):
                time.sleep(0.001)
            fill_up(place, 0)
            done = command.wait()
            (place / "ballast").unlink(missing_ok=True)
            what = done.message or "finished"
            if done.code and done.verdict != "traceback":
                done = run([*words, "overwrite=True"], self.log, _small_shards)
            self.add("full during a fill", done, done.code == 0, what)

    def read_only_cache(self) -> None:
        """A complete cache may be read-only; one that lacks something may not."""
        for complete in (True, False):
            with disk(self.place()) as place:
                shutil.copytree(self.folder / "cache", place / "cache")
                if not complete:
                    next(place.glob("cache/*/shard-*")).unlink()
                read_only(place)
                out = self.place()
                done = run(self.train(out, f"reference_cache.directory={place}/cache"), self.log)
                right = adapter(out) == self.adapter if complete and done.code == 0 else done.verdict == "refused"
                self.add("read-only cache", done, right and complete == (done.code == 0), f"complete: {complete}")

    # Company ---------------------------------------------------------------------------------------------------------

    def two_runs(self) -> None:
        """One of them goes on undisturbed, the other is refused."""
        out = self.place()
        first = Command(self.train(out), self.log)
        time.sleep(self.rng.uniform(0, self.seconds))
        done = run(self.train(out), self.folder / "other.txt"), first.wait()
        codes = sorted(one.code for one in done)
        refused = max(done, key=lambda one: one.code)
        reason = any(words in refused.message for words in ("Another run writes to", "results of another run"))
        self.add("two runs", refused, codes == [0, 1] and reason and adapter(out) == self.adapter, str(codes))

    def two_fills(self) -> None:
        """Both end, and the cache is that of one."""
        work = Filling(self.folder, f"both{self.number}")
        self.number += 1
        first = Command(work.words(), self.log, work.prepare)
        done = run(work.words(), self.folder / "other.txt", work.prepare), first.wait()
        alone = Filling(self.folder, "alone")
        run(alone.words(), alone.log, alone.prepare)
        right = [one.code for one in done] == [0, 0] and work.result() == alone.result()
        self.add("two fills", max(done, key=lambda one: one.code), right)


def _small_shards() -> None:
    cache.SHARD_TOKENS = 60


def campaign(folder: Path, times: int, seed: int = 0, commands: bool = True) -> Tally:
    """Tries all cases.

    Args:
        folder (Path): empty; everything is written there.
        times (int): that those with chance in them are tried.
        seed (int): of moments and sizes.
        commands (bool): try every command that writes on full and read-only disks, too.

    Returns:
        Tally: of the commands.
    """
    cases = Disks(folder, seed)
    if may_mount(folder):
        if commands:
            cases.full_at_the_start()
            cases.read_only_cache()
        for _ in progress(range(times), desc="Full disks", unit="round"):
            cases.full_during_a_run()
            cases.full_during_a_fill()
    else:
        print("Disks were not tried: no right to mount.", flush=True)
    for _ in progress(range(times), desc="Company", unit="round"):
        cases.two_runs()
        cases.two_fills()
    return cases.tally


def main(argv: list[str] | None = None) -> int:
    """Runs the campaign; exit code 1 when anything was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    return carry_out(parser, argv, lambda folder, args: campaign(folder, args.times, args.seed))


if __name__ == "__main__":
    sys.exit(main())
