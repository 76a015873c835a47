"""Training rows to conversations: layouts, mixtures, and what becomes of rows that cannot be trained on."""

import hashlib
import json
import math
import random
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from pact_tune import log
from pact_tune.config import Count, Seed
from pact_tune.conversations import Conversation, Message, RejectedChat, is_response, render_turns
from pact_tune.errors import UserError, unknown_key, unknown_name
from pact_tune.rows import BrokenRow, Source, read_places

COLUMN_KEYS = ("messages", "system", "prompt", "input", "response")
AUDIT_KEYS = ("file", "action")
AUDIT_ACTIONS = ("report", "drop", "constraint_only")
AUDIT_FORMAT = 1
REFUSED = "refused"  # the verdict on a row that the aligned model would not have answered
MIX_KEYS = ("source", "fraction", "name", "split", "columns", "ce_weight", "constraint_weight")
# Columns that are understood without being mapped. A row is read by the first layout of which it has all columns;
# `input` may be missing, and any layout may have a system column beside it.
KNOWN_LAYOUTS = (
    {"messages": "messages"},
    {"messages": "conversations"},
    {"prompt": "instruction", "input": "input", "response": "output"},
    {"prompt": "prompt", "response": "response"},
    {"prompt": "prompt", "response": "completion"},
    {"prompt": "question", "response": "answer"},
    {"prompt": "input", "response": "output"},
)
SYSTEM_COLUMNS = ("system", "system_prompt")
ROLES = {
    **{name: "user" for name in ("user", "human")},
    **{name: "assistant" for name in ("assistant", "gpt", "model", "bot", "chatgpt")},
    **{name: "system" for name in ("system", "developer")},
    **{name: "tool" for name in ("tool", "function", "observation")},
}
# Keys of a turn that its chat template gets to see beside role and content.
PASSED_ON = ("tool_calls", "reasoning_content", "name", "tool_call_id")
READ_KEYS = {"role", "from", "content", "value", "weight", *PASSED_ON}


class BadRow(Exception):
    """A row that cannot be trained on; the message, behind a number of rows, says why."""


@dataclass
class Counts:
    """What became of the rows of one source; plain values, so that it can be written as JSON.

    Attributes:
        source (str): file, folder or data set.
        section (str): what it is in the config, with its weights ("dataset.mix[1], ce_weight 0"); "" for the main source.
        used (int): rows that are trained on.
        conversations (int): what they became: more than the rows where the chat template rewrites earlier turns.
        context_turns (int): assistant turns of these rows that are context and no response: without text, with tool
            calls, of weight 0, or in the prompt of a row of prompt and completion.
        left_out (dict[str, dict[str, Any]]): for each reason, how many ``rows`` were left out, and the place of the
            ``first``.
        ignored (list[str]): columns, and keys of turns ("messages[].id"), that nothing was read from.
        refused (int): rows that the aligned model would have refused, by the audit; those that were not dropped are used.
        dropped (int): rows drawn, and then dropped for that reason.
    """

    source: str
    used: int = 0
    refused: int = 0
    dropped: int = 0
    conversations: int = 0
    context_turns: int = 0
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    section: str = ""

    @property
    def label(self) -> str:
        """The source, told apart from others that read the same file."""
        return f"{self.source}, {self.section}" if self.section else self.source

    def leave_out(self, reason: str, place: str) -> None:
        """Counts a row that is not used."""
        self.left_out.setdefault(reason, {"rows": 0, "first": place})["rows"] += 1

    def ignore(self, names: Iterable[str]) -> None:
        """Notes what is not read, each name once."""
        self.ignored = sorted({*self.ignored, *names})

    def __str__(self) -> str:
        reasons = [f"{entry['rows']} {reason}, first {entry['first']}" for reason, entry in self.left_out.items()]
        notes = [f"left out: {'; '.join(reasons)}"] if reasons else []
        if self.context_turns:
            notes.append(f"{self.context_turns} assistant turns are context only")
        if self.conversations > self.used:
            notes.append(f"{self.conversations} texts, since the chat template rewrites earlier turns")
        if self.refused:
            dropped = f", {self.dropped} of them dropped" if self.dropped else ""
            notes.append(f"{self.refused} rows the aligned model would have refused, by the audit{dropped}")
        if self.ignored:
            notes.append(f"not read: {', '.join(self.ignored)}")
        return f"{self.used} rows of {self.label}" + (f" ({'. '.join(notes)})" if notes else "")


@dataclass
class ChatDataset:
    """Tokenized conversations and a report of the rows they came from.

    Attributes:
        conversations (list[Conversation]): each with at least one response.
        counts (list[Counts]): one entry a source.
        sources (list[int]): which of them each conversation comes from.
        section (dict[str, Any] | None): the config's section that reads the same rows; None of rows that lay in memory.
    """

    conversations: list[Conversation]
    counts: list[Counts]
    sources: list[int]
    section: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.conversations)

    def first_of_each(self, number: int, among: Container[int]) -> dict[str, list[int]]:
        """Numbers of the first conversations of each source among some, at most so many."""
        of_each: dict[str, list[int]] = {counts.label: [] for counts in self.counts}
        for row, source in enumerate(self.sources):
            rows = of_each[self.counts[source].label]
            if len(rows) < number and row in among:
                rows.append(row)
        return of_each


def chat_dataset(
    tokenizer: PreTrainedTokenizerBase,
    source: Source,
    name: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    system: str | None = None,
    n: Count | None = None,
    mix: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    seed: Seed = 0,
    max_seq_len: Count | None = None,
    anchors: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> ChatDataset:
    """Reads, checks and tokenizes chat or instruction data.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer, with its chat template.
        source (Source): a file, a folder of files, the name of a Hub data set, or a list of these
            (:func:`pact_tune.rows.read_places`).
        name (str | None): configuration of a Hub data set ("main" of openai/gsm8k).
        split (str | None): split of a Hub data set; default "train". A file has none.
        columns (Mapping[str, str] | None): which column holds "prompt", "input" (appended to the prompt), "response"
            and "system", or "messages" and "system"; None recognises the usual layouts, each row by its own.
        system (str | None): a system message put before every row that has none.
        n (int | None): how many rows to train on, source and mix together, drawn without replacement; None takes all.
        mix (Mapping[str, Any] | Sequence[Mapping[str, Any]] | None): a second source, or a list of further ones:
            ``source``, ``fraction`` (its share p of source and mix) and, where needed, ``name``, ``split`` and ``columns``.
            ``n: 5000`` with ``fraction: 0.1`` is the paper's setting. ``ce_weight`` multiplies the cross-entropy of these
            rows and ``constraint_weight`` their constraint (both 1 unless given): ``ce_weight: 0`` keeps rows for the
            constraint alone, ``constraint_weight: 0`` trains on them without it.
        seed (int): of the drawing and of the order.
        max_seq_len (int | None): rows of more tokens are left out, and counted.
        anchors (Mapping[str, Any] | None): the aligned model's own answers, as ``pact anchors`` writes them, beside all of
            these rows: the keys of ``mix``, ``fraction`` being their share of what is then there. An audit is not about
            them, since it would drop the refusals.
        audit (Mapping[str, Any] | None): ``file``, the output of ``pact audit`` on all of these sources, and ``action``,
            what becomes of rows that the aligned model would have refused: "report" (the default: they are counted), "drop"
            (drawn like any row, then left out: what remains is the same run without them) or "constraint_only" (their cross-entropy is not trained on).
        progress (bool): show a progress bar.

    Returns:
        ChatDataset: the conversations, in an order that depends on the seed alone.

    Raises:
        UserError: no such file, an unknown layout, or fewer usable rows than asked for.
    """
    given = {
        key: value for key, value in locals().items() if key not in ("tokenizer", "progress") and value is not None
    }
    for key, value in (("n", n), ("max_seq_len", max_seq_len)):
        if value is not None and not (type(value) is int and value >= 1):
            raise UserError(f"dataset.{key} is {value!r}; it must be a whole number from 1, or null for no limit.")
    rng = random.Random(seed)
    reader = _Reader(tokenizer, system, max_seq_len, progress, None if audit is None else _audit(audit))
    others = [] if mix is None else [mix] if isinstance(mix, Mapping) else list(mix)
    mixed = [
        _mixed(other, "dataset.mix" if isinstance(mix, Mapping) else f"dataset.mix[{i}]")
        for i, other in enumerate(others)
    ]
    anchored = None if anchors is None else _anchors(anchors)
    fractions = [fraction for fraction, _ in mixed]
    total = sum(fractions)
    if total >= 1:
        raise UserError(f"The fractions of dataset.mix add up to {total:g}; they leave no room for dataset.source.")

    wanted = None if n is None else [round(n * fraction) for fraction in fractions]
    first_n = None if n is None or wanted is None else n - sum(wanted)
    conversations, counts = reader.take(_Source(source, name, split, columns), first_n, rng)
    all_counts = [counts]
    drawn = counts.used + counts.dropped
    if wanted is None:
        wanted = [round(drawn * fraction / (1 - total)) for fraction in fractions]
    if anchored is not None:  # beside the data, which are what they would be without them
        fraction = anchored[0]
        wanted.append(round((drawn + sum(wanted)) * fraction / (1 - fraction)))
        mixed.append(anchored)
    for (_, other), number in zip(mixed, wanted, strict=True):
        more, more_counts = reader.take(other, number, rng)
        conversations += more
        all_counts.append(more_counts)
    if not conversations:
        raise UserError(f"No row can be trained on: {'; '.join(map(str, all_counts))}.")
    sources = [number for number, counts in enumerate(all_counts) for _ in range(counts.conversations)]
    order = list(range(len(conversations)))
    if mixed:
        rng.shuffle(order)
    section = {"_component_": "pact_tune.chat_dataset", **given, "source": _as_written(source)}
    return ChatDataset([conversations[i] for i in order], all_counts, [sources[i] for i in order], section)


def _as_written(source: Source) -> str | list[str]:
    """A source as a config names it."""
    return str(source) if isinstance(source, str | Path) else [str(part) for part in source]


def chat_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    title: str,
    columns: Mapping[str, str] | None = None,
    max_seq_len: int | None = None,
    audit: Mapping[str, Any] | None = None,
) -> ChatDataset:
    """Tokenizes rows that lie in memory, in their order; see :func:`chat_dataset`.

    Args:
        tokenizer (PreTrainedTokenizerBase): the model's own tokenizer, with its chat template.
        rows (Iterable[Mapping[str, Any]]): such as a Hugging Face data set.
        title (str): what they are called in messages.
        columns (Mapping[str, str] | None): which column holds what.
        max_seq_len (int | None): rows of more tokens are left out, and counted.
        audit (Mapping[str, Any] | None): as in :func:`chat_dataset`.

    Returns:
        ChatDataset: the conversations.

    Raises:
        UserError: an unknown layout, or no row that can be trained on.
    """
    numbered = [(f"row {number}", dict(row)) for number, row in enumerate(rows)]
    reader = _Reader(tokenizer, None, max_seq_len, True, None if audit is None else _audit(audit))
    conversations, counts = reader.take_from(numbered, _Source(title, columns=columns), None)
    if not conversations:
        raise UserError(f"No row can be trained on: {counts}.")
    return ChatDataset(conversations, [counts], [0] * len(conversations))


@dataclass(frozen=True)
class _Source:
    source: Source
    name: str | None = None
    split: str | None = None
    columns: Mapping[str, str] | None = None
    ce_weight: float = 1.0
    constraint_weight: float = 1.0
    audited: bool = True
    section: str = ""

    @property
    def title(self) -> str:
        return str(self.source) if isinstance(self.source, str | Path) else ", ".join(map(str, self.source))


def _mixed(mix: Mapping[str, Any], where: str) -> tuple[float, _Source]:
    """A further source and its share of all rows, from a section whose keys are all known."""
    if not isinstance(mix, Mapping):
        raise UserError(f"Section '{where}' is {mix!r}; it is a mapping with a source and a fraction.")
    for key in mix:
        if key not in MIX_KEYS:
            raise unknown_key(key, MIX_KEYS, f"section '{where}'")
    if "source" not in mix or "fraction" not in mix:
        raise UserError(f"Section '{where}' needs a source and a fraction from 0 to below 1.")
    fraction = mix["fraction"]
    if not (_is_number(fraction) and 0 <= fraction < 1):
        raise UserError(f"{where}.fraction is {fraction}; it is the source's share of all rows, from 0 to below 1.")
    source = _Source(**{key: value for key, value in mix.items() if key != "fraction"})
    for key, weight in (("ce_weight", source.ce_weight), ("constraint_weight", source.constraint_weight)):
        if not (_is_number(weight) and 0 <= weight < math.inf):
            raise UserError(f"{where}.{key} is {weight}; it is a factor from 0, and 1 leaves it as it is.")
    if source.ce_weight == source.constraint_weight == 0:
        raise UserError(f"Both weights of '{where}' are 0, so its rows do nothing: leave the source out.")
    weights = {key: mix[key] for key in ("ce_weight", "constraint_weight") if mix.get(key, 1) != 1}
    return fraction, replace(
        source, section=", ".join([where, *(f"{key} {value:g}" for key, value in weights.items())])
    )


def _anchors(section: Mapping[str, Any]) -> tuple[float, _Source]:
    fraction, source = _mixed(section, "dataset.anchors")
    # A relative name without a slash may be one of the Hub, but a file of rows is what `pact anchors` writes.
    missing = [name for name in [source.source] if str(name).endswith(".jsonl") and not Path(str(name)).exists()]
    if missing:
        raise UserError(
            f"The anchors '{missing[0]}' do not exist: make them with `pact anchors`, or correct dataset.anchors."
        )
    return fraction, replace(source, audited=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass
class _Reader:
    tokenizer: PreTrainedTokenizerBase
    system: str | None
    max_seq_len: int | None
    progress: bool
    audit: "_Audit | None" = None

    def take(self, where: _Source, wanted: int | None, rng: random.Random) -> tuple[list[Conversation], Counts]:
        """Conversations of the first ``wanted`` usable rows in a shuffled order, or of all of them in the file's order."""
        rows = read_places(where.source, where.name, where.split)
        if wanted is not None:
            rng.shuffle(rows)
        return self.take_from(rows, where, wanted)

    def take_from(
        self, rows: list[tuple[str, Any]], where: _Source, wanted: int | None
    ) -> tuple[list[Conversation], Counts]:
        """The same of rows that are read already, each with its place."""
        _check_columns([row for _, row in rows], where)
        counts = Counts(where.title, section=where.section)
        conversations: list[Conversation] = []
        for place, row in log.progress(
            rows, desc=f"Tokenizing {where.title}", unit="row", disable=not self.progress, leave=False
        ):
            if counts.used + counts.dropped == wanted:
                break
            try:
                found = self._conversations(row, where, counts)
                conversations += found
                counts.used += bool(found)
            except BadRow as error:
                counts.leave_out(str(error), place)
        counts.conversations = len(conversations)
        if wanted is not None and counts.used + counts.dropped < wanted:
            raise UserError(
                f"{wanted} rows of '{where.title}' are asked for, but only {counts.used + counts.dropped} are usable: {counts}."
            )
        return [
            replace(c, ce_weight=c.ce_weight * where.ce_weight, weight=c.weight * where.constraint_weight)
            for c in conversations
        ], counts

    def _conversations(self, row: Any, where: _Source, counts: Counts) -> list[Conversation]:
        """What a row becomes: one conversation, several where the template rewrites earlier turns, none if it is dropped.

        Raises:
            BadRow: it cannot be trained on.
        """
        if isinstance(row, BrokenRow):
            raise BadRow(row.reason)
        if not isinstance(row, dict):
            raise BadRow("that are no objects with columns")
        layout = where.columns or _layout(row)
        counts.ignore(_ignored(row, layout))
        messages = _messages(row, layout)
        refused = self.audit is not None and where.audited and self.audit.refused(messages, counts.source)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        _check_unicode(messages)
        try:
            conversations = render_turns(self.tokenizer, messages)
        except RejectedChat as error:
            raise BadRow(f"rejected: {str(error).rstrip('.')}") from error
        if not conversations:
            raise BadRow("without a response")
        if self.max_seq_len is not None and max(len(c.tokens) for c in conversations) > self.max_seq_len:
            raise BadRow("over max_seq_len")
        if refused and self.audit is not None:
            counts.refused += 1
            if self.audit.action == "drop":
                counts.dropped += 1
                return []
            if self.audit.action == "constraint_only":
                conversations = [replace(conversation, ce_weight=0.0) for conversation in conversations]
        counts.context_turns += sum(m["role"] == "assistant" and not is_response(m) for m in messages)
        return conversations


# Audit ---------------------------------------------------------------------------------------------------------------


def row_key(messages: Sequence[Message]) -> str:
    """Key of a row's content, the same wherever the row stands and whatever else a config puts around it.

    Args:
        messages (Sequence[Message]): the row's own turns, without a system message that a config adds.

    Returns:
        str: 32 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class AuditedRow:
    """A row as an audit sees it.

    Attributes:
        key (str): of :func:`row_key`.
        source (str): file or data set.
        place (str): where in it the row stands.
        messages (list[Message]): its turns.
    """

    key: str
    source: str
    place: str
    messages: list[Message]


def audited_rows(
    source: Source, name: str | None = None, split: str | None = None, columns: Mapping[str, str] | None = None
) -> tuple[list[AuditedRow], Counts]:
    """Rows of a source as :func:`chat_dataset` reads them, before they are rendered.

    Args:
        source (Source): see :func:`chat_dataset`.
        name (str | None): configuration of a Hub data set.
        split (str | None): split of a Hub data set.
        columns (Mapping[str, str] | None): see :func:`chat_dataset`.

    Returns:
        tuple[list[AuditedRow], Counts]: rows with a response, and what became of the others.

    Raises:
        UserError: no such source, or no layout that is known.
    """
    where = _Source(source, name, split, columns)
    places = read_places(source, name, split)
    _check_columns([row for _, row in places], where)
    counts, rows = Counts(where.title), []
    for place, row in places:
        try:
            if isinstance(row, BrokenRow):
                raise BadRow(row.reason)
            if not isinstance(row, dict):
                raise BadRow("that are no objects with columns")
            messages = _messages(row, where.columns or _layout(row))
            if not any(message["role"] == "assistant" and is_response(message) for message in messages[1:]):
                raise BadRow("without a response")
            _check_unicode(messages)
        except BadRow as error:
            counts.leave_out(str(error), place)
            continue
        rows.append(AuditedRow(row_key(messages), where.title, place, messages))
        counts.used += 1
    counts.conversations = counts.used
    return rows, counts


@dataclass(frozen=True)
class _Audit:
    """Verdicts by row, and what becomes of rows that the aligned model would have refused."""

    file: str
    action: str
    verdicts: Mapping[str, str]

    def refused(self, messages: Sequence[Message], source: str) -> bool:
        """The verdict on a row; a row that the audit did not see is an error, since it would go unchecked."""
        verdict = self.verdicts.get(row_key(messages))
        if verdict is None and any(message["role"] == "assistant" and is_response(message) for message in messages[1:]):
            raise UserError(
                f"The audit in '{self.file}' does not cover '{source}' (it has no verdict on a row that begins "
                f"{messages[0]['content'][:40]!r}): run `pact audit` on all of the data."
            )
        return verdict == REFUSED


def _audit(section: Mapping[str, Any]) -> _Audit:
    """Reads the section dataset.audit, and the file that it names."""
    if not isinstance(section, Mapping):
        raise UserError(f"Section 'dataset.audit' is {section!r}; it is a mapping with a file and an action.")
    for key in section:
        if key not in AUDIT_KEYS:
            raise unknown_key(key, AUDIT_KEYS, "section 'dataset.audit'")
    if "file" not in section:
        raise UserError("Section 'dataset.audit' needs a file: the output of `pact audit`.")
    action = section.get("action", "report")
    if action not in AUDIT_ACTIONS:
        raise unknown_name("value of dataset.audit.action", str(action), AUDIT_ACTIONS)
    file = str(section["file"])
    try:
        head, *lines = Path(file).read_text(encoding="utf-8").rstrip("\n").split("\n")
        settings = json.loads(head)
        verdicts = {row["key"]: row["verdict"] for row in map(json.loads, lines)}
    except FileNotFoundError as error:
        raise UserError(f"The audit '{file}' does not exist: make it with `pact audit`.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{file}' is no output of `pact audit`, or is damaged: make it anew.") from error
    if not isinstance(settings, dict) or settings.get("format") != AUDIT_FORMAT:
        raise UserError(f"'{file}' is no output of this version's `pact audit`: make it anew.")
    if settings["rows"] != len(lines):
        raise UserError(f"'{file}' holds {len(lines)} of its {settings['rows']} rows: make it anew with `pact audit`.")
    return _Audit(file, action, verdicts)


# Layouts -------------------------------------------------------------------------------------------------------------


def _check_columns(rows: Sequence[Any], where: _Source) -> None:
    """Raises UserError where a whole source has no layout that is known, or not the columns that it is said to have."""
    present = {str(key) for row in rows if isinstance(row, dict) for key in row}
    if where.columns is not None:
        for key in where.columns:
            if key not in COLUMN_KEYS:
                raise unknown_key(key, COLUMN_KEYS, "section 'dataset.columns'")
        if rows and (missing := [name for name in where.columns.values() if name not in present]):
            raise unknown_name(f"column of '{where.title}'", missing[0], present)
        if "messages" not in where.columns and not {"prompt", "response"} <= set(where.columns):
            raise UserError("Section 'dataset.columns' must name 'messages', or both 'prompt' and 'response'.")
        return
    if not rows:
        raise UserError(f"'{where.title}' holds no rows: give a data set with at least one.")
    if not any(_needed(layout) <= present for layout in KNOWN_LAYOUTS):
        raise UserError(
            f"'{where.title}' has the columns {', '.join(sorted(present)) or '(none)'}, which is no layout that is "
            "recognised: say which is which with dataset.columns.prompt and dataset.columns.response."
        )


def _needed(layout: Mapping[str, str]) -> set[str]:
    return {name for key, name in layout.items() if key not in ("input", "system")}


def _layout(row: Mapping[str, Any]) -> Mapping[str, str]:
    """The known layout of a row: that of the columns that have a value, of all its columns, or of some."""
    filled = _filled(row)
    layout = (
        next((layout for layout in KNOWN_LAYOUTS if _needed(layout) <= filled), None)
        or next((layout for layout in KNOWN_LAYOUTS if _needed(layout) <= set(row)), None)
        or next((layout for layout in KNOWN_LAYOUTS if _needed(layout) & set(row)), None)
    )
    if layout is None:
        raise BadRow("with columns of no known layout")
    system = next((name for name in SYSTEM_COLUMNS if name in filled), None)
    return layout if system is None else {**layout, "system": system}


def _filled(row: Mapping[str, Any]) -> set[str]:
    """The columns of a row that hold something; a table fills the columns of other layouts with nulls or blanks."""
    return {name for name, value in row.items() if not (_is_missing(value) or value == "" or value == [])}


def _ignored(row: Mapping[str, Any], layout: Mapping[str, str]) -> set[str]:
    """Columns of a row, and keys of its turns, that have a value and are not read."""
    ignored = {name or "(unnamed)" for name in _filled(row) - set(layout.values())}
    for key in ("messages", "prompt", "response"):
        turns = row.get(layout.get(key, ""))
        if isinstance(turns, list):
            keys = {
                k for turn in turns if isinstance(turn, dict) for k, value in turn.items() if not _is_missing(value)
            }
            if keys & {"role", "from"}:
                ignored |= {f"{layout[key]}[].{k}" for k in keys - READ_KEYS}
    return ignored


def _is_missing(value: Any) -> bool:
    """Null, in JSON or in a table."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _messages(row: Mapping[str, Any], layout: Mapping[str, str]) -> list[Message]:
    """The turns of a row.

    Raises:
        BadRow: there are none, or what stands there is neither text nor a turn.
    """
    # A row may lack a column that others have (the released data's rows without input).
    values = {key: row.get(name) for key, name in layout.items()}
    system = as_text(values.get("system"), "a system message")
    if "messages" in layout:
        messages = _turns(values["messages"])
    elif _is_turns(values["prompt"]):
        messages = _prompt_and_completion(values["prompt"], values["response"])
    else:
        prompt, more = as_text(values["prompt"], "a prompt"), as_text(values.get("input"), "an input")
        # The released data put instruction and input on one line.
        prompt = f"{prompt} {more}".strip() if more else prompt
        if not prompt:
            raise BadRow("without a prompt")
        messages = [{"role": "user", "content": prompt}, *_completion(values["response"])]
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def _prompt_and_completion(prompt: Any, completion: Any) -> list[Message]:
    """A prompt of several turns and its answer: TRL's layout, in which the answer alone is trained on."""
    before = _turns(prompt)
    for turn in before:
        if turn["role"] == "assistant":
            turn["weight"] = 0
    return [*before, *_completion(completion)]


def _completion(value: Any) -> list[Message]:
    if _is_turns(value):
        return _turns(value)
    return [{"role": "assistant", "content": as_text(value, "a response")}]


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value
    )


def _turns(turns: Any) -> list[Message]:
    """Turns as OpenAI or ShareGPT write them, or the JSON of such.

    Raises:
        BadRow: they are not.
    """
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise BadRow("with messages that are a text and not JSON") from None
    if not turns:
        raise BadRow("without messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("with messages that are no list of turns")
    return [_turn(turn) for turn in turns]


def _turn(turn: Mapping[str, Any]) -> Message:
    name = _first(turn, "role", "from")
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"with a turn of role {str(name)[:40]!r}" if name is not None else "with a turn without a role")
    passed_on = {key: turn[key] for key in PASSED_ON if not _is_missing(turn.get(key))}
    if "tool_calls" in passed_on:
        passed_on["tool_calls"] = [_parsed(call) for call in _listed(passed_on["tool_calls"])]
    value = _first(turn, "content", "value")
    if value is None and role != "assistant":
        raise BadRow(f"with a {role} turn without text")
    weight = _first(turn, "weight")
    if weight not in (None, 0, 1):
        raise BadRow("with a turn whose weight is neither 0 nor 1")
    if weight == 0:
        passed_on["weight"] = 0
    return cast(Message, {"role": role, "content": as_text(value, f"a turn of the {role}"), **passed_on})


def _first(turn: Mapping[str, Any], *keys: str) -> Any:
    return next((turn[key] for key in keys if not _is_missing(turn.get(key))), None)


def _listed(calls: Any) -> list[Any]:
    if not isinstance(calls, list):
        raise BadRow("with tool_calls that are no list")
    return calls


def _parsed(call: Any) -> Any:
    """A tool call whose arguments are an object, as chat templates expect it, and not JSON text, as OpenAI writes it."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        raise BadRow("with a tool call whose arguments are not JSON") from None
    return {**call, "function": {**function, "arguments": arguments}}


def as_text(value: Any, what: str) -> str:
    """A text, a number as text, or the texts of content parts (``[{"type": "text", "text": ...}]``) in one.

    Args:
        value (Any): from a row; null is an empty text.
        what (str): the value, for people ("a prompt").

    Returns:
        str: the text.

    Raises:
        BadRow: it is something else.
    """
    if isinstance(value, str):
        return value
    if _is_missing(value):
        return ""
    if _is_number(value):
        return str(value)
    if not isinstance(value, list):
        raise BadRow(f"with {what} that is neither text nor number")
    return "".join(_part(part, what) for part in value)


def _part(part: Any, what: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise BadRow(f"with {what} that holds {str(kind)[:40]!r} and not only text")
    return cast(str, part["text"])


def _check_unicode(messages: list[Message]) -> None:
    """Raises BadRow for half a surrogate pair, which JSON can write and no tokenizer takes."""
    try:
        json.dumps(messages, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("with a lone surrogate, which is no character") from None
