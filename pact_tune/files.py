"""Files and folders that appear whole or not at all, readable by whoever the umask lets, and never in place of others'.

What is being written lies aside, in the same folder, under ``.NAME.<16 hexadecimal digits>.pact.partial``, a folder locked
while its writer lives. A process that is killed leaves that behind, and nothing else: who writes a folder of the same name next
removes it, and :func:`remove_partial` files and folders; both by exactly such names.

A folder cannot be renamed over a full one. Where the system can exchange two names (Linux's renameat2 with
RENAME_EXCHANGE), the old and the new folder are exchanged and readers see either the one or the other. Elsewhere (macOS, some
network file systems) the old one steps aside to ``.NAME.<16 hexadecimal digits>.pact.old`` for a moment. A process that is killed
in that moment leaves no folder at the path; :func:`recover`, which readers call before they say that nothing is there, puts the
old one back.
"""

import contextlib
import ctypes
import errno
import fcntl
import fnmatch
import glob
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from pact_tune.errors import UserError, printable

PARTIAL, OLD = ".pact.partial", ".pact.old"
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}(?P<kind>\.pact\.partial|\.pact\.old)")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_ALMOST_FULL = 1 << 20  # bytes free; libraries write in larger pieces
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What renameat2 answers where the kernel, the C library or the file system does not know it.
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a path to write to; it becomes ``path`` when the block ends without an error.

    Written aside in the same folder, flushed to disk, then renamed over ``path``, so that a killed process
    leaves the old file or the new one, never half of one.

    Args:
        path (str | os.PathLike): where the file shall appear; what a link points to is replaced, not the link.

    Yields:
        Path: the file to write.

    Raises:
        UserError: the disk is full, or nothing may be written there; names the path and how much was written.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UserError(f"'{path}' is a folder, and a file is to be written there: choose another name.")
    aside = _aside(path, PARTIAL)
    try:
        with _explained(path, aside):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = stat.S_IMODE(aside.stat().st_mode)  # what the umask, or the folder's default ACL, allows
            yield aside
            os.chmod(aside, mode)  # safetensors and mkstemp make files that only their owner may read
            _fsync(aside)
            os.replace(aside, path)
            _fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the folder that it would lie in may be none
            aside.unlink()


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike, marker: str | None = None, names: Collection[str] = ("*",)
) -> Iterator[Path]:
    """Yields a folder to fill; it becomes ``path`` when the block ends without an error.

    At every moment either the old folder or the new one is at ``path`` (who opens two files of it one after the other may
    get one of each).

    Args:
        path (str | os.PathLike): where the folder shall appear; what a link points to is replaced, not the link.
        marker (str | None): see :func:`check_replaceable`, which decides whether an older folder may be replaced.
        names (Collection[str]): see :func:`check_replaceable`.

    Yields:
        Path: the empty folder to fill.

    Raises:
        UserError: another's folder lies there, the disk is full, or nothing may be written there.
    """
    path = Path(os.path.realpath(path))
    recover(path)
    check_replaceable(path, marker, names)
    with _begun(path) as aside, _explained(path, aside):
        mode = stat.S_IMODE(aside.stat().st_mode)
        yield aside
        for entry in [aside, *aside.rglob("*")]:
            if not entry.is_symlink():
                os.chmod(entry, mode if entry.is_dir() else mode & 0o666)
                _fsync(entry)
        check_replaceable(path, marker, names)  # again: writing may have taken hours
        _put(aside, path)  # what is aside now is the old one
        _fsync(path.parent)


def check_replaceable(path: str | os.PathLike, marker: str | None, names: Collection[str] = ("*",)) -> None:
    """Raises UserError where a folder at ``path`` is not one that this command wrote.

    Commands call it before they begin to work, :func:`atomic_folder` before it replaces.

    Args:
        path (str | os.PathLike): may be missing, or an empty folder.
        marker (str | None): the file by which a folder is known as ours; None: only an empty folder is replaced.
        names (Collection[str]): patterns of all files that may lie in such a folder, relative to it ("adapter/x.json").
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError(f"'{path}' exists and is no folder: move it away, or choose another place.")
    files = (entry for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir())
    found = sorted(entry.relative_to(path).as_posix() for entry in files)
    if not found:
        return
    if marker is None or marker not in found:
        raise UserError(
            f"The folder '{path}' exists and was not written by this command (it holds '{found[0]}'"
            + (f" and no {marker}" if marker else "")
            + "): move it away, or choose another place."
        )
    if foreign := [name for name in found if not _matches(name, names)]:
        raise UserError(
            f"The folder '{path}' holds '{foreign[0]}', which was not written by this command and would be lost: move it "
            "away, or choose another place."
        )


def check_subfolder(name: str) -> None:
    """Raises UserError unless ``name`` is one or more folder names, below where it is looked for."""
    parts = name.strip("/").split("/")
    if not all(re.fullmatch(r"[\w.-]+", part) and set(part) != {"."} for part in parts):
        raise UserError(
            f"'{printable(name)}' is no folder name: use letters, digits, '-', '_' and '.', and '/' between names."
        )


def slug(name: str) -> str:
    """A name as a folder's, without the characters that a shell or a file system takes for its own; may be empty.

    What is such a name already stays as it is.
    """
    return re.sub(r"[^\w.+-]+", "-", name).strip("-.")


def check_space(path: str | os.PathLike, needed: int, what: str = "What is to be written") -> None:
    """Raises UserError where a file system has too little room.

    Args:
        path (str | os.PathLike): a file or folder that is going to be written there; need not exist.
        needed (int): bytes.
        what (str): for the message.
    """
    free = free_bytes(path)
    if free < needed:
        raise UserError(
            f"{what} needs {size(needed)} at '{path}', where {size(free)} are free: free some space, or choose another place."
        )


def free_bytes(path: str | os.PathLike) -> int:
    """Bytes that this user may still write where ``path`` lies or is going to lie."""
    path = Path(os.path.realpath(path))
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def size(count: float) -> str:
    """A number of bytes for people: "1.5 GB"."""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} bytes"


def recover(path: str | os.PathLike) -> None:
    """Finds again what a replacement that was killed left beside ``path``; see the head of this file.

    Args:
        path (str | os.PathLike): of a folder that :func:`atomic_folder` writes.
    """
    path = Path(path)
    for old in leftovers(path.parent, [path.name], kinds=(OLD,)):
        if not os.path.lexists(path):
            # Without the right to write there, the message that nothing is there stays.
            with contextlib.suppress(OSError):
                os.rename(old, path)


def leftovers(
    directory: str | os.PathLike, names: Collection[str] = ("*",), kinds: Collection[str] = (PARTIAL, OLD)
) -> list[Path]:
    """What killed processes left of :func:`atomic_file` and :func:`atomic_folder` in a folder.

    Args:
        directory (str | os.PathLike): may be missing.
        names (Collection[str]): patterns of the names that were being written.
        kinds (Collection[str]): :data:`PARTIAL`, :data:`OLD`.

    Returns:
        list[Path]: sorted; what others write there at this moment is among them.
    """
    try:
        entries = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = ((entry, _ASIDE.fullmatch(entry)) for entry in entries)
    return [Path(directory) / e for e, m in matches if m and m["kind"] in kinds and _matches(m["name"], names)]


def remove_partial(directory: str | os.PathLike, names: Collection[str] = ("*",)) -> None:
    """Deletes what killed processes left in a folder, after :func:`recover` for what they were replacing.

    Args:
        directory (str | os.PathLike): a folder that no other process writes to; may be missing.
        names (Collection[str]): patterns of the names that were being written.
    """
    for path in leftovers(directory, names):
        if path.name.endswith(OLD):
            recover(path.with_name(_written_name(path)))
        _remove(path)


def remove_folder(path: Path) -> None:
    """Deletes a folder so that no half of it is ever seen at its path."""
    aside = _aside(path, PARTIAL)
    os.rename(path, aside)
    shutil.rmtree(aside)


@contextlib.contextmanager
def _begun(path: Path) -> Iterator[Path]:
    """Makes the folder aside in which ``path`` is filled, locks it, and removes in the end what lies there then.

    Files have no such lock: libraries replace the file that they are given by another.
    """
    with _explained(path, _aside(path, PARTIAL)):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in leftovers(path.parent, [glob.escape(path.name)], kinds=(PARTIAL,)):
            _remove_if_left(left)
        aside, handle = _made(path)
    try:
        yield aside
    finally:
        os.close(handle)
        shutil.rmtree(aside, ignore_errors=True)  # half of the new one, or the old one


def _made(path: Path) -> tuple[Path, int]:
    """A new folder aside, locked; another process that took it for a leftover may have removed it before."""
    while True:
        aside = _aside(path, PARTIAL)
        aside.mkdir()
        handle = None
        try:
            handle = os.open(aside, os.O_RDONLY)
            _lock(handle)
            if os.path.samestat(os.fstat(handle), aside.stat()):
                return aside, handle
        except (FileNotFoundError, BlockingIOError):
            pass
        if handle is not None:
            os.close(handle)


def _remove_if_left(aside: Path) -> None:
    """Removes a folder that a process that was killed was filling; not what one that lives is filling."""
    with contextlib.suppress(OSError):  # a file, or gone meanwhile, its writer lives, or there are no locks to tell
        handle = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            os.close(handle)


def _lock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks, on which nobody removes what others have left
        pass


def _written_name(aside: Path) -> str:
    match = _ASIDE.fullmatch(aside.name)
    assert match is not None
    return match["name"]


def _aside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}{kind}")


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _put(aside: Path, path: Path) -> None:
    """Gives a folder its name; an older one that has it gets the name aside, or another and is removed."""
    if not path.exists():
        os.rename(aside, path)
    elif not _exchange(aside, path):
        _replace_in_two_steps(aside, path)


def _replace_in_two_steps(aside: Path, path: Path) -> None:
    while True:
        old = _aside(path, OLD)
        os.rename(path, old)
        try:
            os.rename(aside, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue  # a reader that came between the two put the old one back
        shutil.rmtree(old, ignore_errors=True)
        return


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path, aside: Path) -> Iterator[None]:
    """Puts a full disk and a folder that may not be written to in one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # safetensors and torch have exceptions of their own for a write that failed
        code = error.errno if isinstance(error, OSError) else None
        where = Path(str(error.filename)) if isinstance(error, OSError) and error.filename else aside
        if _is_full(error, path):
            raise UserError(
                f"There is no space left for '{path}': {size(_written(aside))} were written and {size(free_bytes(path))} "
                "are free; free some space, or choose another place."
            ) from error
        being_made = where.parent == path.parent and where.name.startswith(f".{path.name}.")
        if not (being_made or where.is_relative_to(aside) or path.is_relative_to(where)):
            raise  # about something that was read, say
        if code in (errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"'{path}' cannot be written: '{where}' is no folder; choose another place.") from error
        if code in (*_FORBIDDEN, errno.ENAMETOOLONG, errno.EINVAL):
            raise UserError(
                f"'{path}' cannot be written ({os.strerror(code)}): choose another place, or change who may write there."
            ) from error
        raise


def _is_full(error: Exception, path: Path) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL or f"(os error {errno.ENOSPC})" in str(error):
        return True
    # torch says "file write failed", without a reason.
    return isinstance(error, (OSError, RuntimeError)) and free_bytes(path) < _ALMOST_FULL


def _written(aside: Path) -> int:
    files = [aside] if aside.is_file() else [file for file in aside.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)
