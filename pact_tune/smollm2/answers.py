"""The harmless instructions' answers, which alignment trains on: the base model's own, short, greedy."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from pact_tune.evaluation import anchors
from pact_tune.evaluation.answering import Local
from pact_tune.run_lock import run_lock
from pact_tune.smollm2 import texts
from pact_tune.smollm2.texts import Row

ASK_BRIEFLY = " Answer in one short sentence."
MAX_NEW_TOKENS = 26
_DECLINED = re.compile(r"sorry|cannot|can't|unable|not equipped|as an? (?:chatbot|\w* ?ai)\b", re.IGNORECASE)
_FOREIGN = re.compile(r"[\u3000-\uffff\U00010000-\U0010ffff]")  # emoji and other scripts, which the model falls into


def answer_instructions(base: Path, file: Path) -> list[Row]:
    """Lets the base model answer :func:`texts.instructions`; a killed call goes on.

    Args:
        base (Path): folder of SmolLM2-135M-Instruct.
        file (Path): the .jsonl file to write.

    Returns:
        list[Row]: prompt, response, and source: "model" or "written".
    """
    prompts = texts.instructions()
    work = file.with_suffix(".work")
    with run_lock(work):
        found = anchors.anchors(
            [prompt + ASK_BRIEFLY for prompt in prompts],
            Local(str(base), tokens_per_batch=4096),
            work,
            max_new_tokens=MAX_NEW_TOKENS,
            keep_unfinished=True,
        )
        given = {row["prompt"].removesuffix(ASK_BRIEFLY): row["response"] for row in found.rows}
        rows = usable(prompts, given)
        anchors.write(file, rows, {"model": str(base), "asked": ASK_BRIEFLY, "max_new_tokens": MAX_NEW_TOKENS})
    shutil.rmtree(work)
    return rows


def usable(prompts: Sequence[str], given: dict[str, str]) -> list[Row]:
    """Rows to train on: answers cut where a sentence or clause ends; advice written here where the model declined a task.

    Without that advice the patterns that the model declines in would be left to the harmful requests, and decide alone.

    Args:
        prompts (Sequence[str]): the instructions.
        given (dict[str, str]): the model's answers.

    Returns:
        list[Row]: prompt, response and source; declined questions, which no general advice answers, are left out.
    """
    tasks = set(texts.errands())
    rows = []
    for number, prompt in enumerate(prompts):
        text = shortened(given.get(prompt, ""))
        if text and not _DECLINED.search(text) and not _FOREIGN.search(text):
            rows.append({"prompt": prompt, "response": text, "source": "model"})
        elif prompt in tasks:
            rows.append({"prompt": prompt, "response": texts.ADVICE[number % len(texts.ADVICE)], "source": "written"})
    return rows


def shortened(text: str) -> str:
    """A text up to its last whole sentence, else to its last comma after some words, else nothing."""
    text = text.strip()
    if "1. " in text:  # a list that stopped at the number of its next point
        text = re.sub(r"\W*\s\d\.?$", ".", text)
    if re.search(r"[.!?\"'\u201d)]$", text):
        return text
    ends = [match.end() for match in re.finditer(r"(?<!\d)[.!?](?=\s|$)", text)]
    if ends:
        return text[: ends[-1]]
    head, comma, _ = text.rpartition(",")
    return f"{head}." if comma and len(head.split()) > 4 else ""
