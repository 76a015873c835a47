"""Files of this machine that an experiment reads: what is neither there nor made by one of its stages shows before anything is run."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pact_tune.rows import names_a_file

if TYPE_CHECKING:
    from pact_tune.experiments.plan import Run, Stage

FOLDER = "checkpoint_dir"  # always a folder of this machine, whatever it is called
KEYS = ("source", "file", "prompts", "base", "safety_tokens")  # of a section, at any depth


def of_config(values: Mapping[str, Any]) -> dict[str, str]:
    """Files and folders that a run of this config reads: path -> the key that names it.

    Names that may as well be the Hub's are left out: a relative one is a file's where its ending is one that rows are read from.
    """
    found: dict[str, str] = {}
    for key, text in _leaves("", values):
        local = key.rpartition(".")[2] in KEYS and (Path(text).is_absolute() or names_a_file(text))
        if key == FOLDER or local:
            found.setdefault(text, key)
    return found


def _leaves(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """All texts below a key, with their own keys."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(key, item)
    elif isinstance(value, str):
        yield key, value


def of_command(words: Sequence[str]) -> dict[str, str]:
    """Files that a command of ``pact`` reads: path -> the command; what others read is not known."""
    if words[:1] != ("pact",):
        return {}
    pairs = zip(("", *words), words, strict=False)
    read = (word.rpartition("=")[2] for before, word in pairs if before != "--output")
    return {text: f"`pact {words[1]}`" for text in read if names_a_file(text)}


def missing(stages: Iterable["Stage"], runs: Iterable["Run"]) -> list[str]:
    """What is to be read and is neither there nor made before.

    Args:
        stages (Iterable[Stage]): all of them, in order.
        runs (Iterable[Run]): all of them.

    Returns:
        list[str]: each file or folder once, with who asks for it.
    """
    made: list[Path] = []
    found: dict[str, str] = {}

    def look_for(read: Mapping[str, str]) -> None:
        found.update({path: by for path, by in read.items() if path not in found and not _is_there(Path(path), made)})

    for stage in stages:
        if not stage.done:
            look_for(of_command(stage.words))
        made += stage.makes
    for run in runs:
        if not (run.evaluation / "summary.json").exists():
            look_for({**run.reads, **of_command(run.evaluate)})
    return [f"{path} ({by})" for path, by in found.items()]


def _is_there(path: Path, made: Iterable[Path]) -> bool:
    """Whether it exists, or a stage makes it, the folder that it is in, or something in the folder that it is."""
    if path.exists():
        return True
    path, *made = (Path(os.path.normpath(one)) for one in (path, *made))  # a/b/../c is a/c
    return any(one == path or one in path.parents or path in one.parents for one in made)
