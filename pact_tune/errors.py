"""The one exception that users are meant to read."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input that its owner can mend; the message is one sentence that says how.

    Command-line entry points print the message alone (no traceback) and exit with 1.
    """


def unknown_key(key: str, valid: Iterable[str], where: str) -> UserError:
    """Builds the error for a key nobody reads.

    Args:
        key (str): the key as written.
        valid (Iterable[str]): the keys that exist there.
        where (str): the place, for people ("section 'loss'").

    Returns:
        UserError: names the nearest valid key, or all of them when none is near.
    """
    valid = sorted(valid)
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(valid)}."
    return UserError(f"Unknown key '{key}' in {where}; {hint}")
