"""Files and folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path to write to; it becomes ``path`` when the block ends without an error.

    Written aside in the same folder, flushed to disk, then renamed over ``path``, so that a killed process
    leaves the old file or the new one, never half of one.

    Args:
        path (str | os.PathLike): where the file shall appear.

    Yields:
        Path: the file to write.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    aside = Path(aside)
    try:
        yield aside
        _fsync(aside)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
        _fsync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a folder to fill; it becomes ``path`` (replacing an older one) when the block ends without an error.

    Args:
        path (str | os.PathLike): where the folder shall appear.

    Yields:
        Path: the empty folder to fill.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield aside
        for file in aside.rglob("*"):
            _fsync(file)
        os.chmod(aside, 0o755)
        if path.exists():
            # A folder cannot be renamed over a full one: the old one steps aside first.
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, old)
            os.replace(aside, path)
            shutil.rmtree(old)
        else:
            os.replace(aside, path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove_partial(directory: str | os.PathLike) -> None:
    """Deletes what killed processes left of :func:`atomic_file` and :func:`atomic_folder` in a folder.

    Args:
        directory (str | os.PathLike): a folder that no other process writes to; may be missing.
    """
    for path in [*Path(directory).glob(".*.partial"), *Path(directory).glob(".*.old")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
