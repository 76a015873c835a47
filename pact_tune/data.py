"""Training rows from JSON, JSONL, CSV, TSV or a Hub data set, with a second source mixed in where asked for."""

import csv
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pact_tune.conversations import Conversation, Message, render
from pact_tune.errors import UserError, unknown_key

COLUMN_KEYS = ("messages", "system", "prompt", "input", "response")
# Columns that are understood without being mapped, the first layout that a source has; `input` is optional in a row.
KNOWN_LAYOUTS = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "instruction", "input": "input", "response": "output"},
    {"prompt": "prompt", "response": "response"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "question", "response": "answer"},
    {"prompt": "input", "response": "output"},
)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass
class Counts:
    """What became of the rows of one source.

    Attributes:
        source (str): file or data set.
        used (int): rows that are trained on.
        no_response (int): rows left out because no assistant turn has text.
        too_long (int): rows left out because they exceed ``max_seq_len`` tokens.
        malformed (int): rows left out because a column is missing or not of the expected kind.
    """

    source: str
    used: int = 0
    no_response: int = 0
    too_long: int = 0
    malformed: int = 0

    def __str__(self) -> str:
        left_out = {
            "without a response": self.no_response,
            "over max_seq_len": self.too_long,
            "malformed": self.malformed,
        }
        notes = ", ".join(f"{number} {name}" for name, number in left_out.items() if number)
        return f"{self.used} rows of {self.source}" + (f" (left out: {notes})" if notes else "")


@dataclass
class ChatDataset:
    """Tokenized conversations and a report of the rows they came from.

    Attributes:
        conversations (list[Conversation]): each with at least one response.
        counts (list[Counts]): one entry a source.
    """

    conversations: list[Conversation]
    counts: list[Counts]

    def __len__(self) -> int:
        return len(self.conversations)


def chat_dataset(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    n: int | None = None,
    mix: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_seq_len: int | None = None,
    progress: bool = True,
) -> ChatDataset:
    """Reads, checks and tokenizes chat or instruction data.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer, with its chat template.
        source (str): a .json, .jsonl, .csv or .tsv file, or the name of a Hub data set.
        split (str): split of a Hub data set.
        columns (Mapping[str, str] | None): which column holds "prompt", "input" (appended to the prompt), "response"
            and "system", or "messages"; None recognises the usual layouts.
        system (str | None): a system message put before every row that has none.
        n (int | None): how many rows to train on, both sources together, drawn without replacement; None takes all.
        mix (Mapping[str, Any] | None): a second source: ``source``, ``fraction`` (its share p of all rows) and, where
            needed, ``split`` and ``columns``. ``n: 5000`` with ``fraction: 0.1`` is the paper's setting.
        seed (int): of the drawing and of the order.
        max_seq_len (int | None): rows of more tokens are left out, and counted.
        progress (bool): show a progress bar.

    Returns:
        ChatDataset: the conversations, in an order that depends on the seed alone.

    Raises:
        UserError: no such file, an unknown layout, or fewer usable rows than asked for.
    """
    rng = random.Random(seed)
    reader = _Reader(tokenizer, system, max_seq_len, progress)
    if mix is None:
        conversations, counts = reader.take(source, split, columns, n, rng)
        return ChatDataset(_not_empty(conversations, [counts]), [counts])

    for key in mix:
        if key not in ("source", "fraction", "split", "columns"):
            raise unknown_key(key, ("source", "fraction", "split", "columns"), "section 'dataset.mix'")
    if "source" not in mix or "fraction" not in mix:
        raise UserError("Section 'dataset.mix' needs a source and a fraction between 0 and 1.")
    fraction = float(mix["fraction"])
    if not 0 <= fraction < 1:
        raise UserError(
            f"dataset.mix.fraction is {fraction}; it is the second source's share of all rows, from 0 to below 1."
        )
    first_n = None if n is None else n - round(n * fraction)
    conversations, counts = reader.take(source, split, columns, first_n, rng)
    second_n = round(counts.used * fraction / (1 - fraction)) if n is None else n - first_n
    more, more_counts = reader.take(mix["source"], mix.get("split", "train"), mix.get("columns"), second_n, rng)
    conversations = _not_empty(conversations + more, [counts, more_counts])
    rng.shuffle(conversations)
    return ChatDataset(conversations, [counts, more_counts])


def read_rows(source: str, split: str = "train") -> list[Any]:
    """Rows of a file or of a Hub data set, as they stand there.

    Args:
        source (str): a .json, .jsonl, .csv or .tsv file, or the name of a Hub data set.
        split (str): split of a Hub data set.

    Returns:
        list[Any]: one dict a row; a JSONL line that cannot be parsed is None.

    Raises:
        UserError: no such file or data set, or a file that cannot be read.
    """
    path = Path(source)
    if path.suffix in (".json", ".jsonl", ".csv", ".tsv"):
        if not path.is_file():
            raise UserError(f"The data file '{source}' does not exist: check dataset.source.")
        return _READERS[path.suffix](path)
    import datasets  # takes seconds to import, and only Hub data need it

    try:
        return list(datasets.load_dataset(source, split=split))
    except Exception as error:  # datasets raises its own, fsspec's and huggingface_hub's types
        raise UserError(
            f"The data set '{source}' (split '{split}') could not be loaded ({str(error).splitlines()[0]}): give a .json, "
            ".jsonl, .csv or .tsv file, or the name of a Hub data set that is downloaded or reachable."
        ) from error


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{path}' is not valid JSON ({error}); a file with one row a line is called .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"'{path}' holds one JSON {type(rows).__name__}; it must hold a list of rows.")
    return rows


def _read_jsonl(path: Path) -> list[Any]:
    return [_parse_line(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _read_csv(path: Path, delimiter: str = ",") -> list[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": lambda path: _read_csv(path, delimiter="\t"),
}


@dataclass
class _Reader:
    tokenizer: PreTrainedTokenizerBase
    system: str | None
    max_seq_len: int | None
    progress: bool

    def take(
        self, source: str, split: str, columns: Mapping[str, str] | None, wanted: int | None, rng: random.Random
    ) -> tuple[list[Conversation], Counts]:
        """The first ``wanted`` usable rows in a shuffled order, or all of them in the file's order."""
        rows = read_rows(source, split)
        layout = _layout(rows, columns, source)
        if wanted is not None:
            rng.shuffle(rows)
        counts = Counts(source)
        conversations: list[Conversation] = []
        for row in tqdm(
            rows, desc=f"Tokenizing {Path(source).name}", unit="row", disable=not self.progress, leave=False
        ):
            if counts.used == wanted:
                break
            conversation = self._conversation(row, layout, counts)
            if conversation is not None:
                conversations.append(conversation)
                counts.used += 1
        if wanted is not None and counts.used < wanted:
            raise UserError(f"{wanted} rows of '{source}' are asked for, but only {counts.used} are usable: {counts}.")
        return conversations, counts

    def _conversation(self, row: Any, layout: Mapping[str, str], counts: Counts) -> Conversation | None:
        messages = _messages(row, layout)
        if messages is None:
            counts.malformed += 1
            return None
        if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            counts.no_response += 1
            return None
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        conversation = render(self.tokenizer, messages)
        if self.max_seq_len is not None and len(conversation.tokens) > self.max_seq_len:
            counts.too_long += 1
            return None
        return conversation


def _layout(rows: list[Any], columns: Mapping[str, str] | None, source: str) -> Mapping[str, str]:
    present = {key for row in rows[:100] if isinstance(row, dict) for key in row}
    if columns is not None:
        for key in columns:
            if key not in COLUMN_KEYS:
                raise unknown_key(key, COLUMN_KEYS, "section 'dataset.columns'")
        if rows and (missing := [name for name in columns.values() if name not in present]):
            raise unknown_key(missing[0], present, f"the columns of '{source}'")
        if "messages" not in columns and not {"prompt", "response"} <= set(columns):
            raise UserError("Section 'dataset.columns' must name 'messages', or both 'prompt' and 'response'.")
        return columns
    for layout in KNOWN_LAYOUTS:
        if {name for key, name in layout.items() if key != "input"} <= present:
            return layout
    if not rows:
        raise UserError(f"'{source}' holds no rows: give a data set with at least one.")
    raise UserError(
        f"'{source}' has the columns {', '.join(sorted(present)) or '(none)'}, which is no layout that is recognised: "
        "say which is which with dataset.columns.prompt and dataset.columns.response."
    )


def _messages(row: Any, layout: Mapping[str, str]) -> list[Message] | None:
    """The turns of a row, or None when it is malformed."""
    if not isinstance(row, dict):
        return None
    if "messages" in layout:
        return _chat_messages(row.get(layout["messages"]))
    prompt, response = row.get(layout["prompt"]), row.get(layout["response"], "")
    more = row.get(layout.get("input", ""), "")
    system = row.get(layout.get("system", ""), "")
    prompt, response, more, system = ("" if value is None else value for value in (prompt, response, more, system))
    if not all(isinstance(value, str) for value in (prompt, response, more, system)) or not (prompt or more):
        return None
    # The released data put instruction and input on one line.
    messages: list[Message] = [{"role": "user", "content": f"{prompt} {more}".strip() if more else prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return [*messages, {"role": "assistant", "content": response}]


def _chat_messages(turns: Any) -> list[Message] | None:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    messages: list[Message] = []
    for turn in turns:
        role = SHAREGPT_ROLES.get(turn.get("role", turn.get("from")))
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            return None
        messages.append({"role": role, "content": content})
    return messages


def _not_empty(conversations: list[Conversation], counts: Iterable[Counts]) -> list[Conversation]:
    if not conversations:
        raise UserError(f"No row can be trained on: {'; '.join(map(str, counts))}.")
    return conversations
