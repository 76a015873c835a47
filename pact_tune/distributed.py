"""Runs on several processes."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from pact_tune import log
from pact_tune.errors import UserError
from pact_tune.signals import Interrupted

SECONDS_FOR_RANK_0 = 60  # after which a rank that alone met an error says so itself


def run_ranks(work: Callable[[], None]) -> int | str | None:
    """Does some work on one process, or on those that torchrun started.

    Args:
        work (Callable[[], None]): every rank's.

    Returns:
        int | str | None: what the process exits with: None, the message of a user error, or 128 + a signal's number. With
        several processes nothing returns: each end ends the process.
    """
    try:
        if "LOCAL_RANK" in os.environ:
            # Ranks also talk on the CPU, without waiting for a device.
            dist.init_process_group("cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo")
        work()
        if dist.is_initialized():
            finish()
    except UserError as error:
        if log.debugging():
            raise
        return refuse(f"pact_lora_finetune: {error}")
    except Interrupted as error:
        log.logger.info(error)
        return _stopped(error.code)
    except KeyboardInterrupt:
        return _stopped(130)
    return None


def _stopped(code: int) -> int:
    """The exit code of a process that a signal ended; one of several ends here, see :func:`finish`."""
    if dist.is_initialized():
        _exit(code)
    return code


def refuse(message: str) -> str:
    """Ends a process that torchrun started, so that a message stands at the end of what is written; else returns it.

    torchrun ends all processes with the first that fails, writes forty lines about those that failed, and ends them with
    what it finds in its error file. Every rank meets the same user error: let rank 0 be the one that fails with it.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return message
    if log.rank():
        signal.signal(signal.SIGTERM, lambda *_: _exit(0))
        time.sleep(SECONDS_FOR_RANK_0)
    reply = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
    Path(file).write_text(json.dumps(reply))
    _exit(1)


def wait_for_all() -> None:
    """Returns once all ranks have called it."""
    if dist.is_initialized():
        dist.barrier()


def finish() -> NoReturn:
    """Ends a process that torchrun started, successfully, once everything is written: the last call of a command.

    Python is not shut down. The process group's references live on in caches (DTensor keeps the device mesh) and in default
    arguments of modules that were imported later, and with it gloo's threads. One of them that still drops a tensor while
    Python shuts down ends the process with SIGABRT, and torchrun calls a finished run failed.
    """
    dist.barrier()
    dist.destroy_process_group()
    _exit(0)


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
