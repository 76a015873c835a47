"""Ctrl-C and SIGTERM: the step at work is finished, the state is saved, and the process ends with the signal's code."""

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
import torch.distributed as dist


class Interrupted(Exception):
    """A run ended early on request, with its state saved.

    Args:
        signum (int): the signal; the exit code is 128 more.
        step (int): steps that are done.
        total (int): steps of the run.
    """

    def __init__(self, signum: int, step: int, total: int) -> None:
        super().__init__(
            f"Stopped after step {step} of {total}; the same command with resume_from_checkpoint=True goes on from there."
        )
        self.code = 128 + signum


class StopRequest:
    """Remembers SIGINT and SIGTERM while it is open; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self._signum = 0

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self._signum == signal.SIGINT == signum:
            raise KeyboardInterrupt
        self._signum = signum

    def check(self, step: int, total: int, save: Callable[[], None] | None = None) -> None:
        """Ends the run where a signal came; all ranks must call it.

        Args:
            step (int): steps that are done.
            total (int): steps of the run.
            save (Callable[[], None] | None): saves the state; None: it is saved.

        Raises:
            Interrupted: with the signal's code.
        """
        signum = self.agreed()
        if signum:
            if save is not None:
                save()
            raise Interrupted(signum, step, total)

    def agreed(self) -> int:
        """The signal that any rank has got, 0 while there is none; all ranks must call it, and get the same."""
        if not dist.is_initialized():
            return self._signum
        signum = torch.tensor(self._signum)  # on the CPU, where ranks talk without waiting for a device
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)
