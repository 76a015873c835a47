"""What evaluation and training write down: JSONL files that a killed run goes on with, and the figures' records."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pact_tune.errors import UserError
from pact_tune.files import atomic_file

Record = dict[str, Any]
WORDS = {"items": "items, which are the benchmark's rows up to --limit"}  # settings that no option is called by


class Journal:
    """A JSONL file with one record an ``index``, appended to as work is done, and the settings it was made with.

    A killed process leaves whole lines and at most one half line, which the next one cuts off. The settings stand in a
    file of their own beside it (``NAME.settings.json``), so that each line of the JSONL is a record and nothing else.

    Args:
        path (str | Path): the .jsonl file.
        settings (Mapping[str, Any] | None): what its records depend on; None reads a finished file.
        keys (Collection[str]): what each record has, beside its index.

    Raises:
        UserError: the file was made with other settings, is damaged, or is to be read and is not there.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any] | None = None, keys: Collection[str] = ()) -> None:
        self.path = Path(path)
        self.keys = {"index", *keys}
        self.settings_path = self.path.with_suffix(".settings.json")
        self.done: dict[int, Record] = {}
        if settings is not None:
            self._claim(dict(settings))
        self.settings: Record = self._read_settings()
        if self.path.exists():
            self.done = {record["index"]: record for record in self._read(mend=settings is not None)}

    def append(self, records: Iterable[Record]) -> None:
        """Adds records, each with an ``index``, in one write."""
        records = list(records)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        self.done |= {record["index"]: record for record in records}

    def in_order(self) -> list[Record]:
        """All records by their index."""
        return [self.done[index] for index in sorted(self.done)]

    def _claim(self, settings: Record) -> None:
        settings = json.loads(json.dumps(settings))  # as it will be read back
        if self.settings_path.exists():
            old = self._read_settings()
            if differing := [key for key in settings if old.get(key) != settings[key]]:
                raise UserError(
                    f"'{self.path}' was made with other settings ({', '.join(WORDS.get(key, key) for key in differing)}): choose "
                    "another output folder, or delete this file and its settings."
                )
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)  # records that nobody vouches for
        with atomic_file(self.settings_path) as file:
            file.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def _read_settings(self) -> Record:
        try:
            return dict(json.loads(self.settings_path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise UserError(f"'{self.path}' is not there: run `pact evaluate` first.") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"'{self.settings_path}' is damaged: delete it and '{self.path.name}'.") from error

    def _read(self, mend: bool) -> list[Record]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if mend and len(whole) < len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        records = []
        for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
            try:
                record = json.loads(line)
                whole_record = isinstance(record["index"], int) and self.keys <= set(record)
            except (ValueError, TypeError, KeyError):
                whole_record = False
            if not whole_record:
                raise UserError(
                    f"Line {number} of '{self.path}' is damaged: delete the line, and run again to make it anew."
                )
            records.append(record)
        return records


# --- what training logs for the paper's figures

ANALYSIS_FILE = "analysis.jsonl"

# kind -> the keys of such a record, beside "kind", and what they mean. A trainer that is asked to (`analysis: True`)
# appends them to ANALYSIS_FILE in its output folder, rank 0 alone, one JSON object a line.
ANALYSIS_KINDS: dict[str, dict[str, str]] = {
    # Figure 3
    "confidence": {
        "step": "optimiser steps done; 0: the initial model",
        "probability": "probability of all safety tokens together at response position 0, mean over held-out prompts",
    },
    # Figure 6
    "sample": {
        "step": "optimiser steps done; 0: the initial model",
        "source": "which of the data's sources the row comes from, as the data set's report names it",
        "row": "row number in the data set",
        "tokens": "response tokens of the row",
        "ce": "mean cross-entropy over them, in nats",
        "kl": "mean of the constraint's term over them; null where the method has none",
    },
    # Figure 7
    "logits": {
        "epoch": "epochs done; 0: the initial model",
        "t": "response position, 0 to 3",
        "mean": "logits of the safety tokens, mean over them and over held-out prompts",
    },
}


def read_analysis(folder: str | Path) -> dict[str, list[Record]]:
    """The figures' records of a run; what stands before a look at the initial model is of a run that was overwritten.

    Args:
        folder (str | Path): the run's output folder.

    Returns:
        dict[str, list[Record]]: by kind; empty where the run logged none.

    Raises:
        UserError: a damaged record, or one of an unknown kind.
    """
    path = Path(folder) / ANALYSIS_FILE
    found: dict[str, dict[tuple, Record]] = {}
    if not path.exists():
        return {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            keys = set(ANALYSIS_KINDS[record["kind"]])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"Line {number} of '{path}' is no record of a known kind: delete the line.") from error
        if not keys <= set(record):
            raise UserError(f"Line {number} of '{path}' lacks '{sorted(keys - set(record))[0]}': delete the line.")
        if record["kind"] == "confidence" and record["step"] == 0:
            found.clear()
        # A run that was killed behind a look and resumed before it looks again.
        moment = tuple(record.get(key) for key in ("step", "epoch", "t", "source", "row"))
        found.setdefault(record["kind"], {})[moment] = record
    return {kind: list(records.values()) for kind, records in found.items()}


def write_analysis(folder: str | Path, records: Sequence[Record]) -> None:
    """Appends records of :data:`ANALYSIS_KINDS` to a run's file."""
    with (Path(folder) / ANALYSIS_FILE).open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(record) + "\n" for record in records))
