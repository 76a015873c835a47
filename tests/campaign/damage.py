"""Bit flips and truncations of every kind of file that a command reads.

    python -m tests.campaign.damage [--each N]

Counted are

    right      refused in one sentence; mended, with the same bits as before; or taken, where nothing in the file or beside it
               could tell (a training row in which one letter is another)
    traceback  a traceback, a crash, or a hang
    silent     taken although a checksum covers the place
"""

import argparse
import gzip
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from recipe import write_workspace

from pact_tune.log import progress
from tests.campaign.processes import Command, Done, Tally, carry_out, run, train

Words = Callable[["House"], list[str]]


@dataclass(frozen=True)
class Kind:
    """A kind of file, and commands that read it.

    Attributes:
        name (str): row of the table.
        file (str): below the house's folder.
        commands (tuple[Words, ...]): taken in turn.
        covered (bool): a checksum, or a hash in a stamp, covers all of it, so damage must be noticed.
        cut (bool): a truncated one must be noticed.
    """

    name: str
    file: str
    commands: tuple[Words, ...]
    covered: bool = False
    cut: bool = True


class House:
    """A model, data, safety tokens, a finished run with its cache and state: what the commands read.

    Args:
        folder (Path): empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "said.txt"
        self.config = write_workspace(folder, rows=12)
        self._data()
        self.number = 0
        first = run(train(self.config, f"output_dir={folder}/run", "epochs=2", *self.cache()), self.log)
        assert first.code == 0, first.said
        merged = run(["pact", "merge", f"{folder}/run/epoch_0/adapter", "--output", f"{folder}/merged"], self.log)
        assert merged.code == 0, merged.said
        self.adapter = self.bits("run", 1)

    def _data(self) -> None:
        rows = [json.loads(line) for line in (self.folder / "rows.jsonl").read_text().splitlines()]
        (self.folder / "rows.json").write_text(json.dumps(rows))
        (self.folder / "rows.csv").write_text(
            "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows)
        )
        (self.folder / "rows.jsonl.gz").write_bytes(gzip.compress((self.folder / "rows.jsonl").read_bytes()))
        import pandas

        pandas.DataFrame(rows).to_parquet(self.folder / "rows.parquet")

    def cache(self) -> list[str]:
        """Overrides that share the finished run's cache."""
        return [f"reference_cache.directory={self.folder}/cache"]

    def bits(self, name: str, epoch: int) -> bytes:
        """A result's adapter, as it lies on disk."""
        return (self.folder / name / f"epoch_{epoch}" / "adapter" / "adapter_model.safetensors").read_bytes()

    def new(self) -> str:
        """A folder that does not exist."""
        self.number += 1
        return str(self.folder / "new" / str(self.number))


def fresh(*overrides: str) -> Words:
    """One step of training."""
    return lambda h: train(h.config, f"output_dir={h.new()}", "max_steps_per_epoch=1", *h.cache(), *overrides)


def data(name: str) -> Words:
    """One step of training on a file."""
    return lambda h: fresh(f"dataset.source={h.folder}/{name}")(h)


def again(h: House) -> list[str]:
    """The finished run, from the cache, which must end with the same bits."""
    return train(h.config, f"output_dir={h.folder}/again", "overwrite=True", "epochs=2", *h.cache())


def resume(h: House) -> list[str]:
    """The finished run, an epoch longer."""
    return train(h.config, f"output_dir={h.folder}/resumed", "epochs=2", "resume_from_checkpoint=True", *h.cache())


def pact(*words: str) -> Words:
    """A command of `pact`; HOUSE and NEW stand for folders."""
    return lambda h: ["pact", *(word.replace("HOUSE", str(h.folder)).replace("NEW", h.new()) for word in words)]


VERIFY = pact("verify", "HOUSE/run/epoch_1", "--rows", "1")
VERIFY_ADAPTER = pact("verify", "HOUSE/run/epoch_1/adapter", "--rows", "1")
MERGE = pact("merge", "HOUSE/run/epoch_1/adapter", "--output", "NEW")
SHOW = pact("tokens", "show", "HOUSE/safety_tokens")
TEMPLATES = pact("tokens", "from-templates", "--tokenizer", "HOUSE/model", "--output", "NEW")
KINDS = (
    Kind("model.safetensors", "model/model.safetensors", (fresh(), VERIFY), cut=True),
    Kind("config.json", "model/config.json", (fresh(), VERIFY, pact("validate", "HOUSE/config.yaml"))),
    Kind("tokenizer.json", "model/tokenizer.json", (fresh(), TEMPLATES)),
    Kind("tokenizer_config.json", "model/tokenizer_config.json", (fresh(), TEMPLATES)),
    Kind("chat_template.jinja", "model/chat_template.jinja", (fresh(), TEMPLATES), cut=False),
    Kind("generation_config.json", "model/generation_config.json", (fresh(),), cut=False),
    Kind("result's model.safetensors", "run/epoch_1/model.safetensors", (VERIFY,), covered=True),
    Kind("result's config.json", "run/epoch_1/config.json", (VERIFY,), covered=True),
    Kind("result's tokenizer.json", "run/epoch_1/tokenizer.json", (VERIFY,), covered=True),
    Kind("pact.json", "run/epoch_1/pact.json", (VERIFY,), covered=True),
    Kind("adapter's pact.json", "run/epoch_1/adapter/pact.json", (VERIFY_ADAPTER, MERGE), covered=True),
    Kind("adapter", "run/epoch_1/adapter/adapter_model.safetensors", (MERGE, VERIFY_ADAPTER, VERIFY), covered=True),
    Kind("adapter_config.json", "run/epoch_1/adapter/adapter_config.json", (MERGE, VERIFY), covered=True),
    Kind("adapter to go on from", "run/epoch_1/adapter/adapter_model.safetensors",
         (fresh("checkpointer.adapter=${checkpoint_dir}/../run/epoch_1/adapter"),)),
    Kind("its adapter_config.json", "run/epoch_1/adapter/adapter_config.json",
         (fresh("checkpointer.adapter=${checkpoint_dir}/../run/epoch_1/adapter"),)),
    Kind("merge", "merged/model.safetensors", (pact("verify", "HOUSE/merged", "--rows", "1"),), covered=True),
    Kind("safety_tokens.safetensors", "safety_tokens/safety_tokens.safetensors", (SHOW, fresh())),
    Kind("safety_tokens.json", "safety_tokens/safety_tokens.json", (SHOW, fresh())),
    Kind("cache shard", "cache/*/shard-*.safetensors", (again,), covered=True),
    Kind("cache manifest", "cache/*/manifest.json", (again, pact("cache", "list", "--directory", "HOUSE/cache")), cut=False),
    Kind("recipe_state.pt", "resumed/recipe_state.pt", (resume,), covered=True),
    Kind("rows.jsonl", "rows.jsonl", (data("rows.jsonl"),), cut=False),
    Kind("rows.json", "rows.json", (data("rows.json"),)),
    Kind("rows.csv", "rows.csv", (data("rows.csv"),), cut=False),
    Kind("rows.jsonl.gz", "rows.jsonl.gz", (data("rows.jsonl.gz"),)),
    Kind("rows.parquet", "rows.parquet", (data("rows.parquet"),)),
    Kind("config.yaml", "config.yaml", (pact("validate", "HOUSE/config.yaml"), fresh()), cut=False),
)  # fmt: skip


def damages(good: bytes, rng: random.Random, number: int) -> Iterator[tuple[str, bytes]]:
    """A third of them truncations, the others flips of one bit; one is a block of zeros.

    Args:
        good (bytes): the file.
        rng (random.Random): which decides where.
        number (int): how many.

    Yields:
        tuple[str, bytes]: what was done, and the damaged file.
    """
    cuts = [0, len(good) // 2, len(good) - 1, 1]
    cuts += [rng.randrange(len(good)) for _ in range(number)]
    for size in cuts[: number // 3]:
        yield f"cut to {size} of {len(good)} bytes", good[:size]
    start = rng.randrange(len(good))
    yield f"zeros from byte {start}", good[:start] + bytes(len(good[start : start + 64])) + good[start + 64 :]
    header = 8 + int.from_bytes(good[:8], "little")
    inside = range(header) if header < len(good) else range(len(good))  # of safetensors, every second one in the header
    for i in range(number - number // 3 - 1):
        place = rng.choice(inside) if i % 2 else rng.randrange(len(good))
        bit = rng.randrange(8)
        yield f"bit {bit} of byte {place} flipped", good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :]


def judge(kind: Kind, house: House, what: str, done: Done, good: bytes, bad: bytes) -> str:
    """The verdict on one try."""
    a_list = "things are wrong in the config:" in done.message
    if done.verdict == "traceback" or (done.verdict == "refused" and "\n" in done.message and not a_list):
        return "traceback"
    if done.verdict == "refused":
        return "right"
    if kind.file.startswith("cache/"):  # mended
        return "right" if house.bits("run", 1) == house.adapter and _again(house) else "silent"
    if bad == good or _same_json(good, bad):
        return "right"
    if kind.name == "recipe_state.pt":  # a bit that no checksum covers and nobody reads: the same adapter all the same
        return "right" if house.bits("resumed", 1) == house.adapter else "silent"
    if kind.covered or (kind.cut and what.startswith("cut")):
        return "silent"
    return "right"


def _again(house: House) -> bool:
    folder = house.folder / "again"
    return not folder.exists() or house.bits("again", 1) == house.adapter


def _same_json(good: bytes, bad: bytes) -> bool:
    try:
        return json.loads(good) == json.loads(bad)
    except ValueError:
        return False


def prepare_resume(house: House) -> None:
    """A run of two epochs that was stopped after the first."""
    target = house.folder / "resumed"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(house.folder / "first", target)


def campaign(folder: Path, each: int, seed: int = 0, kinds: tuple[Kind, ...] = KINDS) -> Tally:
    """Damages every kind of file and runs commands on it.

    Args:
        folder (Path): empty; everything is written there.
        each (int): damages a kind.
        seed (int): of the places.
        kinds (tuple[Kind, ...]): which.

    Returns:
        Tally: of all.
    """
    house, tally = House(folder), Tally("damaged files")
    words = train(house.config, f"output_dir={folder}/first", "epochs=2", *house.cache())
    Command(words, house.log).kill_when(lambda: (folder / "first" / "epoch_0").exists())
    shutil.rmtree(folder / "first" / "epoch_1", ignore_errors=True)  # where the kill came too late
    for kind in kinds:
        rng = random.Random(f"{seed} {kind.name}")
        prepare_resume(house)
        path = next(folder.glob(kind.file))
        good = path.read_bytes()
        bar = progress(damages(good, rng, each), total=each, desc=f"Damage, {kind.name}", unit="file")
        for i, (what, bad) in enumerate(bar):
            if kind.name == "recipe_state.pt":
                prepare_resume(house)
            path.write_bytes(bad)
            words = kind.commands[i % len(kind.commands)](house)
            done = run(words, house.log)
            verdict = judge(kind, house, what, done, good, bad)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(good)
            shutil.rmtree(folder / "new", ignore_errors=True)
            tally.add(kind.name, verdict, f"{what}, {' '.join(words[:3])}", done.message or done.said)
        print(f"{kind.name}: {dict(tally.kinds[kind.name])}", flush=True)
    return tally


def main(argv: list[str] | None = None) -> int:
    """Runs the campaign; exit code 1 when anything was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=15, help="damages a kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=[], help="only these")

    def chosen(folder: Path, args: argparse.Namespace) -> Tally:
        kinds = tuple(kind for kind in KINDS if not args.kinds or kind.name in args.kinds)
        return campaign(folder, args.each, args.seed, kinds)

    return carry_out(parser, argv, chosen)


if __name__ == "__main__":
    sys.exit(main())
