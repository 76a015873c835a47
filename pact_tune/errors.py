"""The one exception that users are meant to read, and what is written into it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input that its owner can mend; the message is one sentence that says how.

    Command-line entry points print the message alone (no traceback) and exit with 1.
    """


def cannot_load(what: str, where: object, error: Exception, mend: str = "") -> UserError:
    """Builds the error for a model or tokenizer that transformers does not load.

    Args:
        what (str): "model", "tokenizer".
        where (object): folder or Hub name.
        error (Exception): what transformers raised.
        mend (str): what to do about it, where it is not remote code.

    Returns:
        UserError: says when the reason is that its owner's code would have to run.
    """
    if "trust_remote_code" in str(error):
        return UserError(
            f"The {what} in '{where}' needs code of its own to be run: read its .py files, and if you trust them, allow it "
            "with --trust-remote-code, where the command has it (in a config: tokenizer.trust_remote_code=True)."
        )
    return UserError(f"The {what} in '{where}' could not be loaded{mend} ({one_line(error)}).")


def one_line(error: BaseException) -> str:
    """What an exception says, as one line without a full stop, cut to 200 characters, to stand inside a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 200 else text[:199] + "…").rstrip(".")


def printable(text: object) -> str:
    """Somebody else's text for a terminal: without escape codes, changes of direction, half characters.

    Args:
        text (object): anything; ``str`` of it is shown.

    Returns:
        str: one line, in which whatever is not printable is written as Python's escape, a backslash doubled.
    """
    shown = (c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


def unknown_key(key: str, valid: Iterable[str], where: str) -> UserError:
    """Builds the error for a key nobody reads.

    Args:
        key (str): the key as written.
        valid (Iterable[str]): the keys that exist there.
        where (str): the place, for people ("section 'loss'").

    Returns:
        UserError: names the nearest valid key, or all of them when none is near.
    """
    return UserError(f"Unknown key '{key}' in {where}; {_hint(key, valid, 'valid keys')}")


def unknown_name(what: str, name: str, valid: Iterable[str]) -> UserError:
    """Builds the error for a name of nothing.

    Args:
        what (str): what was looked for, for people ("shipped config, nor a file of that path").
        name (str): the name as written.
        valid (Iterable[str]): the names that exist.

    Returns:
        UserError: names the nearest, or all of them when none is near.
    """
    return UserError(f"'{name}' is no {what}; {_hint(name, valid, 'there are')}")


def _hint(word: str, valid: Iterable[str], all_of_them: str) -> str:
    valid = sorted(valid)
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"{all_of_them}: {', '.join(valid)}."
