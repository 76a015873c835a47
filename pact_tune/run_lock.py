"""One run a folder: a lock that names its holder, and what becomes of an earlier run's results."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from pact_tune.errors import UserError
from pact_tune.files import check_replaceable, remove_folder, remove_partial
from pact_tune.log import logger
from pact_tune.run_state import STATE_FILE
from pact_tune.stamp import STAMP_FILE, result_names

LOCK_FILE = ".pact.lock"
# What file systems without locks answer.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def run_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Keeps a folder for this process while the block lasts; the kernel gives it back when the process dies.

    On several processes rank 0 holds it for all.

    Args:
        folder (str | os.PathLike): made where it does not exist, with those above it, and removed if nothing is written there.

    Raises:
        UserError: another process holds it; names its pid and host.
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(folder / LOCK_FILE)
    except OSError as error:
        raise UserError(
            f"The folder '{folder}' cannot be written to ({error.strerror}): choose another output_dir, or change who may "
            "write there."
        ) from error
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)  # while it is held, so that nobody holds a file without a name
        os.close(handle)
        with contextlib.suppress(OSError):  # one holds something, and so do those above it
            for path in new:
                path.rmdir()


@contextlib.contextmanager
def claim_output(cfg: DictConfig, rank: int) -> Iterator[None]:
    """Keeps a run's output folder for it: no other run writes there, and no other's results lie among its own.

    Args:
        cfg (DictConfig): the complete config of a recipe.
        rank (int): of this process; rank 0 acts for all.

    Raises:
        UserError: another run writes there, or has left results and ``overwrite`` is not set.
    """
    if rank:
        yield
        return
    with run_lock(cfg.output_dir):
        remove_partial(cfg.output_dir, ("epoch_*", STATE_FILE))
        if not cfg.resume_from_checkpoint:
            claim_results(cfg.output_dir, "epoch_*", STAMP_FILE, cfg.overwrite)
        yield


def _locked(file: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 4096)
            os.close(handle)
            raise UserError(
                f"Another run writes to '{file.parent}' ({_describe(holder)}): wait for it, stop it, or choose another "
                "output_dir."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            logger.warning(
                "The file system of '%s' has no locks: see to it that no other run writes there.", file.parent
            )
        # The holder before may have removed the name between our opening and locking it.
        if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
            break
        os.close(handle)
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk; what needs room says how much
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}).encode())
    return handle


def _describe(holder: bytes) -> str:
    try:
        fields = json.loads(holder)
        return f"pid {int(fields['pid'])} on host {str(fields['host'])[:64]!r}, since {str(fields['started'])[:32]}"
    except (ValueError, KeyError, TypeError):  # it has locked the file and not written to it yet
        return "it has just started"


def claim_results(folder: str | os.PathLike, pattern: str, marker: str, overwrite: bool = False) -> None:
    """Sees to it that a new run does not leave its results among those of another.

    For a run that starts from the beginning; one that is resumed goes on with its own results.

    Args:
        folder (str | os.PathLike): where results appear; may be missing.
        pattern (str): their names, such as "epoch_*".
        marker (str): the file by which a result is known as one ("pact.json").
        overwrite (bool): delete the other run's results.

    Raises:
        UserError: there are results, and ``overwrite`` is not set; or something of that name is no result.
    """
    found = sorted(path for path in Path(folder).glob(pattern) if path.is_dir())
    for path in found:
        check_replaceable(path, marker, result_names(path))
    if found and not overwrite:
        raise UserError(
            f"'{folder}' holds the results of another run ({', '.join(path.name for path in found)}): choose another "
            "output_dir, go on with that run (resume_from_checkpoint=True), or delete its results (overwrite=True)."
        )
    for path in found:
        remove_folder(path)
