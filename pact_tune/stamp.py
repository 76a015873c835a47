"""`pact.json`: how a result was made, and hashes of all its files, written beside them.

So a result can be told from one made without the constraint, and from one that was changed afterwards. It is not a
signature: whoever changes a file can write a new stamp, too.
"""

import fnmatch
import glob
import hashlib
import json
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.fingerprints import file_digest

STAMP_FILE = "pact.json"
FORMAT = 2


def data_fingerprint(conversations: Iterable[Conversation]) -> str:
    """Hash of tokenized training rows and their order: 32 hexadecimal digits."""
    return hashlib.blake2b(b"".join(c.key for c in conversations), digest_size=16).hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """What trains here: the GPU's name (of other devices their kind), the number of processes, torch's version."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    processes = dist.get_world_size() if dist.is_initialized() else 1
    return {"device": name, "processes": processes, "torch": torch.__version__}


def write_stamp(folder: Path, stamp: dict[str, Any]) -> None:
    """Writes pact.json, with a hash of each file that lies in the folder now, and one of itself.

    Args:
        folder (Path): where the result lies, complete but for the stamp.
        stamp (dict[str, Any]): what it says.
    """
    stamp = {"format": FORMAT, **_plain(stamp), "files": _hashes(folder, _files(folder))}
    stamp["checksum"] = _checksum(stamp)
    text = json.dumps(stamp, indent=2, sort_keys=True, allow_nan=False)
    (folder / STAMP_FILE).write_text(text + "\n")


def _plain(value: Any) -> Any:
    """A value of a config or a loss as JSON can hold it: paths, infinities and NaN are written as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_stamp(folder: Path) -> dict[str, Any]:
    """Reads pact.json and makes sure that it is as it was written.

    Args:
        folder (Path): a result.

    Returns:
        dict[str, Any]: what it says.

    Raises:
        UserError: no stamp, a damaged or edited one, or one of another format.
    """
    file = folder / STAMP_FILE
    try:
        stamp = json.loads(file.read_text())
        version = stamp.get("format")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"There is no {STAMP_FILE} in '{folder}': it is no result of pact-tune, or was trained without it."
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"'{file}' is damaged ({error}): take the result from where it was made.") from error
    if version != FORMAT:
        mend = "update pact-tune" if isinstance(version, int) and version > FORMAT else "train it again"
        raise UserError(f"'{file}' has format {version}, this pact-tune reads {FORMAT}: {mend}.")
    if stamp.get("checksum") != _checksum(stamp):
        raise UserError(f"'{file}' was edited after it was written: take the result from where it was made.")
    return stamp


def check_files(folder: Path, stamp: dict[str, Any]) -> None:
    """Makes sure that a result consists of the files that its stamp was written for.

    Files that nothing loads may come later: hidden ones, a README, a licence.

    Args:
        folder (Path): the result.
        stamp (dict[str, Any]): its stamp.

    Raises:
        UserError: a file that changed, is missing, or was added.
    """
    expected, found = stamp["files"], _files(folder)
    if missing := sorted(expected.keys() - set(found)):
        raise UserError(f"'{folder / missing[0]}' is missing: take the result from where it was made.")
    hashes = _hashes(folder, [name for name in found if name in expected])
    if changed := sorted(name for name in hashes if hashes[name] != expected[name]):
        raise UserError(
            f"'{folder / changed[0]}' is not the file that {STAMP_FILE} was written for: it was changed since."
        )
    added = [name for name in found if name not in expected and not name.endswith((".md", "LICENSE", "NOTICE"))]
    if added:
        raise UserError(f"'{folder / sorted(added)[0]}' was added after {STAMP_FILE} was written: remove it.")


def result_names(folder: Path) -> list[str]:
    """What a result that lies there consists of, as patterns for :func:`pact_tune.files.check_replaceable`.

    Args:
        folder (Path): a result; may be missing.

    Returns:
        list[str]: the stamp and what it lists; the stamp alone where there is none, or where it cannot be trusted.
    """
    try:
        return [STAMP_FILE, *map(glob.escape, read_stamp(folder)["files"])]
    except UserError:
        return [STAMP_FILE]


def _files(folder: Path) -> list[str]:
    """Names of a result's files, relative to it: all but its stamp, hidden ones, and what a trainer puts there beside it.

    That is logs, which it goes on writing, and checkpoints to resume from, which have stamps of their own.
    """
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    hidden = [any(part.startswith(".") for part in path.parts) for path in paths]
    names = [path.as_posix() for path, skip in zip(paths, hidden, strict=True) if not skip]
    beside = (STAMP_FILE, "*.log", "checkpoint-*/*")
    return sorted(name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in beside))


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        digests = pool.map(file_digest, [folder / name for name in names])
    return {name: digest.hex()[:32] for name, digest in zip(names, digests, strict=True)}


def _checksum(stamp: dict[str, Any]) -> str:
    content = {key: value for key, value in stamp.items() if key != "checksum"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
