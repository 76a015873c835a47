"""Task accuracy: what counts as the right answer, exactly."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# target of a row, response -> right or wrong
Scorer = Callable[[Mapping[str, Any], str], bool]

_NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"


def exact(target: Mapping[str, Any], response: str) -> bool:
    """The answer and nothing else, up to blanks around it."""
    return response.strip() == str(target["answer"]).strip()


def choice(target: Mapping[str, Any], response: str) -> bool:
    """The answer is the one choice that the response names, as a word of its own, in any case; two choices are wrong.

    ``choices`` are texts, or lists of texts that mean the same; ``answer`` is one of the texts.
    """
    groups = [[c] if isinstance(c, str) else list(c) for c in target["choices"]]
    named = [group for group in groups if any(_names(response, name) for name in group)]
    return len(named) == 1 and str(target["answer"]).casefold() in [name.casefold() for name in named[0]]


def regex(target: Mapping[str, Any], response: str) -> bool:
    """The pattern occurs in the response; a group in it, where there is one and an ``answer``, must equal the answer."""
    match = re.search(target["regex"], response)
    if match is None:
        return False
    if "answer" in target and match.re.groups:
        return (match[1] or "").strip() == str(target["answer"]).strip()
    return True


def number(target: Mapping[str, Any], response: str) -> bool:
    """GSM8K: the same number as the reference's after "####".

    The response's is the first after its last "####"; without one, the last number after "answer is", else the last of all.
    """
    return (found := final_number(response)) is not None and found == final_number(str(target["answer"]))


def final_number(text: str) -> float | None:
    """The number that a worked solution ends with; see :func:`number`."""
    if "####" in text:
        numbers = re.findall(_NUMBER, text.rsplit("####", 1)[1])[:1]
    else:
        numbers = re.findall(rf"answer is:?\D{{0,20}}?({_NUMBER})", text, re.IGNORECASE) or re.findall(_NUMBER, text)
    return float(numbers[-1].replace(",", "").replace("$", "")) if numbers else None


def _names(response: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", response, re.IGNORECASE) is not None


AG_NEWS: Sequence[Sequence[str]] = (
    ("World",),
    ("Sports", "Sport"),
    ("Business",),
    ("Sci/Tech", "Science and Technology", "Science", "Technology", "Sci", "Tech"),
)
SCORERS: dict[str, Scorer] = {"exact": exact, "choice": choice, "regex": regex, "number": number}
