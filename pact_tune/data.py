"""Training rows from JSON, JSONL, CSV, TSV or a Hub data set, with a second source mixed in where asked for."""

import csv
import functools
import io
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from pact_tune.conversations import Conversation, Message, RejectedChat, one_line, render
from pact_tune.errors import UserError, unknown_key

COLUMN_KEYS = ("messages", "system", "prompt", "input", "response")
MIX_KEYS = ("source", "fraction", "name", "split", "columns")
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
        malformed (int): rows left out because a column is missing, too many or not of the expected kind.
        rejected (int): rows left out because the chat template does not take them.
        rejected_because (str): why the first of those was rejected.
    """

    source: str
    used: int = 0
    no_response: int = 0
    too_long: int = 0
    malformed: int = 0
    rejected: int = 0
    rejected_because: str = ""

    def __str__(self) -> str:
        left_out = {
            "without a response": self.no_response,
            "over max_seq_len": self.too_long,
            "malformed": self.malformed,
            f"rejected: {self.rejected_because.rstrip('.')}": self.rejected,
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
    name: str | None = None,
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
        name (str | None): configuration of a Hub data set ("main" of openai/gsm8k).
        split (str): split of a Hub data set.
        columns (Mapping[str, str] | None): which column holds "prompt", "input" (appended to the prompt), "response"
            and "system", or "messages" and "system"; None recognises the usual layouts.
        system (str | None): a system message put before every row that has none.
        n (int | None): how many rows to train on, both sources together, drawn without replacement; None takes all.
        mix (Mapping[str, Any] | None): a second source: ``source``, ``fraction`` (its share p of all rows) and, where
            needed, ``name``, ``split`` and ``columns``. ``n: 5000`` with ``fraction: 0.1`` is the paper's setting.
        seed (int): of the drawing and of the order.
        max_seq_len (int | None): rows of more tokens are left out, and counted.
        progress (bool): show a progress bar.

    Returns:
        ChatDataset: the conversations, in an order that depends on the seed alone.

    Raises:
        UserError: no such file, an unknown layout, or fewer usable rows than asked for.
    """
    for key, value in (("n", n), ("max_seq_len", max_seq_len)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise UserError(f"dataset.{key} is {value!r}; it must be a whole number from 1, or null for no limit.")
    rng = random.Random(seed)
    reader = _Reader(tokenizer, system, max_seq_len, progress)
    if mix is None:
        conversations, counts = reader.take(_Source(source, name, split, columns), n, rng)
        return ChatDataset(_not_empty(conversations, [counts]), [counts])

    fraction = _mix_fraction(mix)
    second = _Source(**{key: mix[key] for key in mix if key != "fraction"})
    first_n = None if n is None else n - round(n * fraction)
    conversations, counts = reader.take(_Source(source, name, split, columns), first_n, rng)
    second_n = round(counts.used * fraction / (1 - fraction)) if n is None else n - first_n
    more, more_counts = reader.take(second, second_n, rng)
    conversations = _not_empty(conversations + more, [counts, more_counts])
    rng.shuffle(conversations)
    return ChatDataset(conversations, [counts, more_counts])


def _mix_fraction(mix: Mapping[str, Any]) -> float:
    """The second source's share of all rows, from a section whose keys are all known."""
    for key in mix:
        if key not in MIX_KEYS:
            raise unknown_key(key, MIX_KEYS, "section 'dataset.mix'")
    if "source" not in mix or "fraction" not in mix:
        raise UserError("Section 'dataset.mix' needs a source and a fraction from 0 to below 1.")
    fraction = mix["fraction"]
    if not (isinstance(fraction, int | float) and 0 <= fraction < 1):
        raise UserError(
            f"dataset.mix.fraction is {fraction}; it is the second source's share of all rows, from 0 to below 1."
        )
    return fraction


def read_rows(
    source: str | Path, name: str | None = None, split: str = "train", options: Mapping[str, Any] | None = None
) -> list[Any]:
    """Rows of a file or of a Hub data set, as they stand there.

    Args:
        source (str | Path): a .json, .jsonl, .csv, .tsv or .txt file (UTF-8), or the name of a Hub data set. In a .tsv
            file quotation marks are text like any other.
        name (str | None): configuration of a Hub data set.
        split (str): split of a Hub data set.
        options (Mapping[str, Any] | None): what a Hub data set's own builder needs to be told.

    Returns:
        list[Any]: one dict a row, of a .txt file one str a line. In place of a broken row (a JSONL line that cannot be
            parsed, a CSV row of too many fields) stands the UserError that says so: the caller counts it or raises it.

    Raises:
        UserError: no such file or data set, or a file that cannot be read.
    """
    path = Path(source)
    kinds = ", ".join(_READERS)
    if path.is_file() or path.suffix in _READERS:
        if path.suffix not in _READERS:
            raise UserError(f"'{source}' is of an unknown kind: give a {kinds} file.")
        if not path.is_file():
            raise UserError(f"The file '{source}' does not exist: check the path.")
        try:
            text = path.read_bytes().decode("utf-8-sig")  # Windows programs begin a file with a byte-order mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{source}' cannot be read as UTF-8 text ({error}): save it as UTF-8.") from error
        return _READERS[path.suffix](source, text)
    import datasets  # takes seconds to import, and only Hub data need it

    try:
        return list(datasets.load_dataset(str(source), name, split=split, **(options or {})))
    except Exception as error:  # datasets raises its own, fsspec's and huggingface_hub's types
        raise UserError(
            f"The data set '{source}' (split '{split}') could not be loaded ({one_line(error)}): check the name, log in "
            f"with `hf auth login` where it asks for access, or give a {kinds} file."
        ) from error


def _read_json(source: str | Path, text: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"'{source}' is not valid JSON ({error}): mend it; a file with one row a line is called .jsonl."
        ) from error
    if not isinstance(rows, list):
        kind = type(rows).__name__
        raise UserError(f"'{source}' holds one JSON {kind}, not a JSON list: put the rows in a list, or give JSONL.")
    return rows


def _lines(text: str) -> Iterable[str]:
    # Not splitlines(): JSON allows U+2028 and its like inside a string.
    return io.StringIO(text, newline="")


def _read_jsonl(source: str | Path, text: str) -> list[Any]:
    return [_parse_line(source, number, line) for number, line in enumerate(_lines(text), 1) if line.strip()]


def _parse_line(source: str | Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        reason = str(error).split(": line 1 ")[0]  # each line is the parser's first
        return UserError(f"'{source}' is not valid JSON at line {number} ({reason}): mend or remove the line.")


def _read_csv(source: str | Path, text: str, **dialect: Any) -> list[Any]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 131,072 characters would end the run
    reader = csv.DictReader(_lines(text), strict=True, **dialect)
    try:
        # A surplus field stands under None: a comma that was not quoted has then cut the last column short.
        return [
            UserError(f"'{source}' has more fields than columns at line {reader.line_num}: mend or remove the row.")
            if None in row
            else row
            for row in reader
        ]
    except csv.Error as error:
        raise UserError(
            f"'{source}' is not valid CSV (line {reader.reader.line_num}: {error}): a field with quotation marks must "
            "stand in quotation marks, its own ones doubled."
        ) from error


def _read_txt(source: str | Path, text: str) -> list[Any]:
    return [line.strip() for line in _lines(text) if line.strip()]


_READERS = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".txt": _read_txt,
}


@dataclass(frozen=True)
class _Source:
    source: str
    name: str | None = None
    split: str = "train"
    columns: Mapping[str, str] | None = None


@dataclass
class _Reader:
    tokenizer: PreTrainedTokenizerBase
    system: str | None
    max_seq_len: int | None
    progress: bool

    def take(self, where: _Source, wanted: int | None, rng: random.Random) -> tuple[list[Conversation], Counts]:
        """The first ``wanted`` usable rows in a shuffled order, or all of them in the file's order."""
        source = where.source
        rows = read_rows(source, where.name, where.split)
        layout = _layout(rows, where.columns, source)
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
        try:
            conversation = render(self.tokenizer, messages)
        except RejectedChat as error:
            counts.rejected += 1
            counts.rejected_because = counts.rejected_because or str(error)
            return None
        if self.max_seq_len is not None and len(conversation.tokens) > self.max_seq_len:
            counts.too_long += 1
            return None
        return conversation


def _layout(rows: list[Any], columns: Mapping[str, str] | None, source: str) -> Mapping[str, str]:
    present = {key for row in rows if isinstance(row, dict) for key in row}
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
    # A row may lack a column that others have (the released data's rows without input).
    values = {key: row.get(name) for key, name in layout.items()}
    texts = {key: "" if values.get(key) is None else values[key] for key in ("prompt", "input", "response", "system")}
    if not all(isinstance(text, str) for text in texts.values()):
        return None
    if "messages" in layout:
        messages = _chat_messages(values["messages"])
    elif texts["prompt"] or texts["input"]:
        # The released data put instruction and input on one line.
        prompt = f"{texts['prompt']} {texts['input']}".strip() if texts["input"] else texts["prompt"]
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": texts["response"]}]
    else:
        return None
    if messages and texts["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": texts["system"]}, *messages]
    return messages


def _chat_messages(turns: Any) -> list[Message] | None:
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    messages: list[Message] = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in SHAREGPT_ROLES or not isinstance(content, str):
            return None
        messages.append({"role": SHAREGPT_ROLES[role], "content": content})
    return messages


def _not_empty(conversations: list[Conversation], counts: Iterable[Counts]) -> list[Conversation]:
    if not conversations:
        raise UserError(f"No row can be trained on: {'; '.join(map(str, counts))}.")
    return conversations
