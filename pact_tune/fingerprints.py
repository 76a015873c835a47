"""Hashes that tell tensors and models apart; BLAKE2b, 32 hexadecimal digits."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pact_tune.errors import UserError

INDEX = "model.safetensors.index.json"


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of tensors' names, types, shapes and bytes.

    Args:
        tensors (Mapping[str, torch.Tensor]): on any device.

    Returns:
        str: 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_fingerprint(folder: str | Path) -> str:
    """Hash of a checkpoint's weight files and config.json: which model this is, whatever its folder is called.

    The same weights cut into other files are another model to it.

    Args:
        folder (str | Path): checkpoint in Hugging Face format.

    Returns:
        str: 32 hexadecimal digits.

    Raises:
        UserError: no weights, or a file that cannot be read.
    """
    folder = Path(folder)
    try:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if (folder / INDEX).is_file():
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        config = json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode()
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            digests = list(pool.map(file_digest, [folder / name for name in names]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The model in '{folder}' is incomplete or damaged ({error}): download it again.") from error
    if not digests:
        raise UserError(f"The folder '{folder}' holds no weights (*.safetensors is missing): download the model again.")
    return hashlib.blake2b(b"".join(digests) + config, digest_size=16).hexdigest()


def file_digest(path: Path) -> bytes:
    """BLAKE2b of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()
