"""`pact run`: torchtune's own command, with one sentence at its end where torchrun would write a report and a traceback."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torchtune._cli import tune

from pact_tune import log

SECONDS_TO_SAVE = (
    600  # that torchrun gives a run to finish its step and save its state before it is killed; its own: 30
)
# They say what the sentence says, above it.
TALKATIVE = ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api")


def run(argv: Sequence[str]) -> int:
    """Runs the recipe, on one process or, with ``--nproc_per_node``, through torchrun.

    Args:
        argv (Sequence[str]): the command line of `tune run`, without "tune".

    Returns:
        int: exit code; what went wrong has been said.

    Raises:
        ChildFailedError: torchrun's report, where PACT_TUNE_DEBUG=1 asks for tracebacks.
    """
    sys.argv = ["tune", *argv]
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    if not log.debugging():
        for name in TALKATIVE:
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        tune.main()
    except SignalException as stopped:  # the processes have said how to go on
        return 128 + stopped.sigval
    except ChildFailedError as error:
        if log.debugging():
            raise
        rank, failure = error.get_first_failure()
        if failure.exitcode - 128 in (signal.SIGINT, signal.SIGTERM):  # one of the processes got it, not torchrun
            return failure.exitcode
        print(sentence(rank, failure), file=sys.stderr)
        return 1
    return 0


def sentence(rank: int, failure: ProcessFailure) -> str:
    """What went wrong: a user error as it is, and where to look for the reason of anything else."""
    if isinstance(failure.message, dict):  # from the process's error file, see pact_tune.distributed
        return str(failure.message["message"])
    how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"failed with code {failure.exitcode}"
    why = (
        "a system that is out of memory does that"
        if failure.exitcode == -signal.SIGKILL
        else "what it wrote stands above"
    )
    return f"pact: process {rank} of the run {how} ({why}); once mended, resume_from_checkpoint=True goes on from the last state."
