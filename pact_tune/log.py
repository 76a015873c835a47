"""Messages and progress: everything that pact-tune says while it works goes through here.

How to use it::

    from pact_tune.log import logger, progress

    logger.info("Reference cache: computing %d views", n)          # rank 0 only, to stdout
    logger.warning("nobody has measured these tokens")             # rank 0 only, to stderr, as "WARNING: ..."
    logger.warning("the shard is damaged", extra=EVERY_RANK)       # from whichever rank it happens on, as "[rank 3] WARNING: ..."
    with progress(total=n, desc="Reference", unit="tok") as bar:   # nothing on the other ranks
        bar.update(5)
    for row in progress(rows, desc="Rows", unit="row"): ...

The command line and the recipe call :func:`setup` once, first thing. As a library pact-tune sets up nothing: the
application's own logging decides. What a command was asked for (a table, a report) is printed; the rest is logged.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from tqdm import tqdm

logger = logging.getLogger("pact_tune")

EVERY_RANK = {"every_rank": True}
SECONDS_PER_LINE = 30.0  # between two lines of progress where there is no terminal
LINE = "{desc}: {percentage:.0f} % ({n_fmt} of {total_fmt} {unit}, {elapsed}, {remaining} left, {rate_fmt}{postfix})"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt} {unit} ({elapsed}, {rate_fmt}{postfix})"


def setup() -> None:
    """Sends the logger's messages to the screen; calling it again changes nothing."""
    quiet_torchao()
    if not sys.stderr.isatty():
        # Other libraries' bars, which would write carriage returns into a file.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not any(isinstance(handler, _Screen) for handler in logger.handlers):
        logger.addHandler(_Screen())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def debugging() -> bool:
    """Whether PACT_TUNE_DEBUG asks for tracebacks of user errors."""
    return os.environ.get("PACT_TUNE_DEBUG", "") not in ("", "0")


def rank() -> int:
    """This process's rank among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def quiet_torchao() -> None:
    """Drops the line that torchao writes when it is imported, about kernels that pact-tune does not use, and Python's warning.

    The warning comes from Python 3.12 on, of an escape in torchao's source, where nothing has compiled that yet (uv does not).
    """
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*\btorchao\b")
    torchao = logging.getLogger("torchao")
    if _is_news not in torchao.filters:
        torchao.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Skipping import of cpp extensions")


class _Screen(logging.Handler):
    """Plain lines: information to stdout, warnings and errors to stderr, never in the middle of a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        every_rank = getattr(record, "every_rank", False)
        if rank() and not every_rank and record.levelno < logging.ERROR:
            return
        stream = sys.stdout if record.levelno < logging.WARNING else sys.stderr
        prefix = f"[rank {rank()}] " if rank() else ""
        if record.levelno >= logging.WARNING:
            prefix += f"{record.levelname}: "
        try:
            # Takes the bars off the screen, and puts them back below the message.
            with tqdm.external_write_mode(file=stream):
                stream.write(f"{prefix}{self.format(record)}\n")
                stream.flush()
        except Exception:  # as every handler does: a message that cannot be written ends no run
            self.handleError(record)


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: float | None = None,
    desc: str = "",
    unit: str = "it",
    initial: float = 0,
    unit_scale: bool = False,
    leave: bool = True,
    disable: bool = False,
) -> "Bar":
    """A progress bar on a terminal, a line every 30 seconds elsewhere, and nothing on ranks other than 0.

    Args:
        iterable (Iterable[Any] | None): what to go through; None: the caller calls ``update``.
        total (float | None): how much there is; default: the length of ``iterable``, where it has one.
        desc (str): what is going on.
        unit (str): of what is counted.
        initial (float): how much was done before.
        unit_scale (bool): write 12.3k for 12300.
        leave (bool): leave the finished bar on the screen.
        disable (bool): show nothing.

    Returns:
        tqdm | Lines: to iterate over, or to use in a ``with``; both have ``n``, ``update``, ``set_postfix_str``, ``close``.
    """
    shared: dict[str, Any] = {"total": total, "desc": desc, "unit": unit, "initial": initial, "unit_scale": unit_scale}
    disable = disable or rank() != 0
    if disable or sys.stderr.isatty():
        return tqdm(iterable, **shared, leave=leave, disable=disable, dynamic_ncols=True, file=sys.stderr)
    return Lines(iterable, **shared)


class Lines:
    """The part of tqdm's interface that pact-tune uses, written as lines of the log.

    Work that takes less than :data:`SECONDS_PER_LINE` writes nothing, longer work also its end.

    Args:
        iterable (Iterable[Any] | None): what to go through.
        total (float | None): how much there is.
        desc (str): what is going on.
        unit (str): of what is counted.
        initial (float): how much was done before.
        unit_scale (bool): write 12.3k for 12300.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        total: float | None,
        desc: str,
        unit: str,
        initial: float,
        unit_scale: bool,
    ) -> None:
        self.iterable, self.desc, self.unit, self.initial, self.unit_scale = iterable, desc, unit, initial, unit_scale
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self.n = initial
        self.postfix = ""
        self.started = self.said = time.monotonic()
        self.said_n: float | None = None

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        assert self.iterable is not None
        try:
            for item in self.iterable:
                yield item
                self.update(1)
        finally:
            self.close()

    def update(self, n: float = 1) -> None:
        """Counts ``n`` more as done."""
        self.n += n
        if time.monotonic() - self.said >= SECONDS_PER_LINE:
            self._say()

    def set_postfix_str(self, text: str) -> None:
        """Adds ``text`` to the next lines."""
        self.postfix = text

    def close(self) -> None:
        """Says the end of work of which a line was written."""
        if self.said_n not in (None, self.n):
            self._say()

    def _say(self) -> None:
        self.said, self.said_n = time.monotonic(), self.n
        total: Any = self.total  # its annotation knows no None, which it takes
        logger.info(
            tqdm.format_meter(
                self.n,
                total,
                self.said - self.started,
                prefix=self.desc or "Progress",
                unit=self.unit,
                unit_scale=self.unit_scale,
                initial=self.initial,
                postfix=self.postfix,
                bar_format=LINE if self.total else LINE_WITHOUT_TOTAL,
            )
        )


Bar = tqdm | Lines
