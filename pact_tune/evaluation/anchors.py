"""Anchors: prompts, harmful and harmless, with the aligned model's own answers, to be trained on beside the user's rows.

They hold the model where it was in both respects: what it refused it goes on refusing, and what it answered it answers.
Its mistakes are held, too, unless it is said which prompts are harmful: then they are left out.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pact_tune.conversations import Message
from pact_tune.errors import UserError
from pact_tune.evaluation.answering import Local
from pact_tune.evaluation.judges import Answered, Phrases
from pact_tune.evaluation.records import Journal
from pact_tune.files import atomic_file
from pact_tune.log import progress

Row = dict[str, str]
Wanted = Literal["refused", "answered"]


class Anchors(NamedTuple):
    """What the aligned model made of some prompts.

    Attributes:
        rows (list[Row]): "prompt" and "response", in the order of the prompts.
        unfinished (int): prompts left out, since the answer was cut off at its longest.
        empty (int): prompts left out, since there was no answer.
        mistaken (int): prompts left out, since a harmful one was answered or a harmless one refused.
    """

    rows: list[Row]
    unfinished: int
    empty: int
    mistaken: int


def anchors(
    prompts: Sequence[str],
    aligned: Local,
    work: Path,
    *,
    wanted: Mapping[str, Wanted] | None = None,
    max_new_tokens: int = 512,
    keep_unfinished: bool = False,
    show_progress: bool = True,
) -> Anchors:
    """Lets the aligned model answer prompts, going on where an earlier call stopped.

    Args:
        prompts (Sequence[str]): equal ones are answered once.
        aligned (Local): the aligned model; greedy unless it says otherwise.
        work (Path): folder for answers; the same call finds them again.
        wanted (Mapping[str, Wanted] | None): of some prompts, what the answer must be to be kept, by refusal phrases.
        max_new_tokens (int): longest answer.
        keep_unfinished (bool): keep answers that were cut off; training ends them there.
        show_progress (bool): show a progress bar.

    Returns:
        Anchors: the rows, and what was left out.
    """
    prompts = list(dict.fromkeys(prompts))
    chats: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt in prompts]
    asked = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:32]
    journal = Journal(work / "answers.jsonl", aligned.settings | {"prompts": asked, "max_new_tokens": max_new_tokens})
    with progress(total=len(prompts), desc="Anchors", unit="prompt", disable=not show_progress) as bar:
        for number, batch in enumerate(aligned.batches(chats, max_new_tokens)):
            if not all(index in journal.done for index in batch):
                answers = aligned.answer([chats[i] for i in batch], max_new_tokens, number)
                journal.append(
                    {"index": i, "response": answer.text.strip(), "ended": answer.ended}
                    for i, answer in zip(batch, answers, strict=True)
                )
            bar.update(len(batch))
    found = list(zip(prompts, journal.in_order(), strict=True))
    full = [(prompt, record) for prompt, record in found if record["response"]]
    kept = [(prompt, record) for prompt, record in full if record["ended"] or keep_unfinished]
    verdicts = Phrases().judge([Answered(prompt, record["response"], record["ended"]) for prompt, record in kept])
    rows = [
        {"prompt": prompt, "response": record["response"]}
        for (prompt, record), verdict in zip(kept, verdicts, strict=True)
        if (wanted or {}).get(prompt, verdict.label) == verdict.label
    ]
    return Anchors(rows, len(full) - len(kept), len(found) - len(full), len(kept) - len(rows))


def check_output(path: Path) -> None:
    """Before any work: a file that is there without settings beside it is not ours, and may be the user's data.

    Args:
        path (Path): the .jsonl file that :func:`write` will write.

    Raises:
        UserError: it holds something else.
    """
    if path.exists() and not path.with_suffix(".settings.json").exists():
        raise UserError(f"'{path}' is there and no output of `pact anchors`: give --output another name.")


def write(path: Path, rows: Sequence[Row], settings: dict[str, Any]) -> None:
    """Writes anchors, a row a line, and beside them ``NAME.settings.json``: what they were made with.

    Args:
        path (Path): the .jsonl file.
        rows (Sequence[Row]): of :func:`anchors`.
        settings (dict[str, Any]): of the model and the call.
    """
    with atomic_file(path.with_suffix(".settings.json")) as file:
        file.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic_file(path) as file, file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
