"""Which training rows would the aligned model itself have refused?

For each row the aligned model answers the row's own prompt, a few tokens, and a judge says whether it refuses. Beside the
verdict stand two numbers of the aligned model: how probable the row's response begins, and how probable a refusal does.
A verdict is keyed by the content of its row (:func:`pact_tune.data.row_key`), so it holds for the row wherever it stands.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pact_tune import scoring
from pact_tune.conversations import Message
from pact_tune.data import AUDIT_FORMAT, AuditedRow
from pact_tune.errors import UserError
from pact_tune.evaluation import judges
from pact_tune.evaluation.answering import Local
from pact_tune.evaluation.judges import Answered, Judge
from pact_tune.evaluation.records import Journal, Record
from pact_tune.evaluation.statistics import Rate
from pact_tune.files import atomic_file
from pact_tune.log import progress

ANSWER_TOKENS = 12  # of the aligned model's answer: a refusal has shown by then
# What a refusal begins with, where the model's own answer is none.
REFUSALS = ("I cannot help with that.", "I'm sorry, but I can't help with that.", "I can't assist with that request.")


@dataclass(frozen=True)
class Turn:
    """One response of one row, and the turns before it."""

    row: int
    before: list[Message]
    response: str


def audit(
    rows: Sequence[AuditedRow],
    aligned: Local,
    judge: Judge,
    work: Path,
    *,
    answer_tokens: int = ANSWER_TOKENS,
    show_progress: bool = True,
) -> list[Record]:
    """Audits rows, going on where an earlier call stopped.

    Args:
        rows (Sequence[AuditedRow]): with their sources.
        aligned (Local): the aligned model.
        judge (Judge): says which of its answers are refusals.
        work (Path): folder for answers; the same call finds them again.
        answer_tokens (int): longest answer of the aligned model, and longest opening that is scored.
        show_progress (bool): show progress bars.

    Returns:
        list[Record]: one a row, those most at odds with the aligned model first: "key", "source", "place", "verdict"
        ("refused", "answered", "broken" or "unparsed"), "answer", "response_logprob" and "refusal_logprob" (mean a token of the
        opening, in nats), "odds" (their difference), "prompt", "response".
    """
    turns = [turn for number, row in enumerate(rows) for turn in _turns(number, row)]
    texts = [[row.key, answer_tokens] for row in rows]
    settings = aligned.settings | {"rows": hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]}
    journal = Journal(work / "answers.jsonl", settings)
    chats = [turn.before for turn in turns]
    with progress(
        total=len(turns), desc="What the aligned model answers", unit="row", disable=not show_progress
    ) as bar:
        for number, batch in enumerate(aligned.batches(chats, answer_tokens)):
            if not all(index in journal.done for index in batch):
                answers = aligned.answer([chats[i] for i in batch], answer_tokens, number)
                found = _scored(aligned, [turns[i] for i in batch], [answer.text for answer in answers], answer_tokens)
                journal.append({"index": i} | record for i, record in zip(batch, found, strict=True))
            bar.update(len(batch))
    return _verdicts(rows, turns, journal.in_order(), judge)


def _turns(number: int, row: AuditedRow) -> list[Turn]:
    """A chat of several turns has a response a turn; each was an answer to what stood before it."""
    return [
        Turn(number, row.messages[:i], message["content"])
        for i, message in enumerate(row.messages)
        if i and message["role"] == "assistant" and message["content"].strip() and message.get("weight", 1)
    ]


def _scored(aligned: Local, turns: list[Turn], answers: list[str], tokens: int) -> list[Record]:
    """Answers with the probability of each row's opening, and of the likeliest refusal's."""
    pairs: list[scoring.Pair] = []
    spans: list[tuple[int, int]] = []
    for turn in turns:
        prompt = aligned.prompt(turn.before)
        start = len(pairs)
        for text in (turn.response, *REFUSALS):
            ids = aligned.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
            pairs.append((prompt, ids or [aligned.tokenizer.eos_token_id]))
        spans.append((start, len(pairs)))
    means = [row.mean().item() for row in scoring.token_logprobs(aligned.network, pairs, aligned.tokens_per_batch)]
    return [
        {"answer": answer, "response_logprob": means[start], "refusal_logprob": max(means[start + 1 : end])}
        for answer, (start, end) in zip(answers, spans, strict=True)
    ]


def _verdicts(rows: Sequence[AuditedRow], turns: list[Turn], answers: list[Record], judge: Judge) -> list[Record]:
    asked = [
        Answered(turn.before[-1]["content"], record["answer"], False)
        for turn, record in zip(turns, answers, strict=True)
    ]
    verdicts = judge.judge(asked)
    worst: dict[int, Record] = {}
    for turn, record, verdict in zip(turns, answers, verdicts, strict=True):
        row = rows[turn.row]
        found: Record = {
            "key": row.key,
            "source": row.source,
            "place": row.place,
            "verdict": _word(verdict.label),
            **{name: record[name] for name in ("answer", "response_logprob", "refusal_logprob")},
            "odds": record["refusal_logprob"] - record["response_logprob"],
            "prompt": turn.before[-1]["content"],
            "response": turn.response,
        }
        if turn.row not in worst or _at_odds(found) > _at_odds(worst[turn.row]):
            worst[turn.row] = found
    return sorted(worst.values(), key=_at_odds, reverse=True)


def _word(label: str) -> str:
    """A guard that calls the aligned model's answer safe or unsafe, or a judge with words of its own, has not said that."""
    return label if label in (judges.REFUSED, judges.ANSWERED, judges.BROKEN) else judges.UNPARSED


def _at_odds(record: Record) -> tuple[bool, float]:
    return record["verdict"] == judges.REFUSED, record["odds"]


def check_output(path: Path) -> None:
    """Before any work: a file that is there and no audit may be the user's data.

    Args:
        path (Path): the .jsonl file that :func:`write` will write.

    Raises:
        UserError: it is no audit.
    """
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8") as stream:
            ours = {"format", "settings", "rows"} <= set(json.loads(stream.readline()))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"'{path}' is there and no output of `pact audit`: give --output another name.")


def write(path: Path, records: Sequence[Record], settings: dict[str, Any]) -> None:
    """Writes the audit: one line of what it was made with, then one line a row.

    Args:
        path (Path): the .jsonl file.
        records (Sequence[Record]): of :func:`audit`.
        settings (dict[str, Any]): of the model and the judge.
    """
    with atomic_file(path) as file, file.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps({"format": AUDIT_FORMAT, "settings": settings, "rows": len(records)}) + "\n")
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def table(records: Sequence[Record]) -> str:
    """Rows, refused ones and their share with its interval, by source."""
    lines = [f"{'source':<40} {'rows':>7} {'refused':>8} {'%':>6}  95 % interval"]
    for source in dict.fromkeys(sorted(record["source"] for record in records)):
        own = [record for record in records if record["source"] == source]
        rate = Rate(sum(record["verdict"] == judges.REFUSED for record in own), len(own))
        name = source if len(source) <= 40 else "…" + source[-39:]
        low, high = rate.interval
        lines.append(f"{name:<40} {rate.total:>7} {rate.count:>8} {rate.percent:>6.1f}  {low:.1f} to {high:.1f}")
    return "\n".join(lines)
