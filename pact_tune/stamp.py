"""`pact.json`: how a result was made, written beside it, so that it can be told from one made without the constraint."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.reference_cache import conversation_key

STAMP_FILE = "pact.json"
FORMAT = 1


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of tensors' names, types, shapes and bytes.

    Args:
        tensors (dict[str, torch.Tensor]): on any device.

    Returns:
        str: 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def data_fingerprint(conversations: Iterable[Conversation]) -> str:
    """Hash of tokenized training rows and their order: 32 hexadecimal digits."""
    return hashlib.blake2b(b"".join(map(conversation_key, conversations)), digest_size=16).hexdigest()


def write_stamp(folder: Path, stamp: dict[str, Any]) -> None:
    """Writes pact.json.

    Args:
        folder (Path): where the result lies.
        stamp (dict[str, Any]): what it says.
    """
    text = json.dumps({"format": FORMAT, **stamp}, indent=2, sort_keys=True)
    (folder / STAMP_FILE).write_text(text + "\n")


def read_stamp(folder: Path) -> dict[str, Any]:
    """Reads pact.json.

    Args:
        folder (Path): a result.

    Returns:
        dict[str, Any]: what it says.

    Raises:
        UserError: no stamp, a damaged one, or one of another format.
    """
    try:
        stamp = json.loads((folder / STAMP_FILE).read_text())
    except FileNotFoundError as error:
        raise UserError(
            f"There is no {STAMP_FILE} in '{folder}': it is no result of pact-tune, or was trained without it."
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"'{folder / STAMP_FILE}' is damaged ({error}): take the result from where it was made."
        ) from error
    if stamp.get("format") != FORMAT:
        raise UserError(
            f"'{folder / STAMP_FILE}' has format {stamp.get('format')}, this pact-tune reads {FORMAT}: update pact-tune."
        )
    return stamp
