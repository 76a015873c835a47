"""`pact run`: torchtune's own command, with one sentence at its end where torchrun would write a report and a traceback."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torchtune._cli import tune
from torchtune._recipe_registry import get_all_recipes

from pact_tune import log
from pact_tune.arguments import Parser
from pact_tune.errors import UserError, unknown_name
from pact_tune.torchtune.config import RECIPE

SECONDS_TO_SAVE = (
    600  # that torchrun gives a run to finish its step and save its state before it is killed; its own: 30
)
# They say what the sentence says, above it.
TALKATIVE = ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api")

SHAPE = (
    f"write `pact run [options of torchrun] {RECIPE} --config NAME [key=value ...]`, with a NAME that `pact ls` lists"
)


def run(argv: Sequence[str]) -> int:
    """Runs the recipe, on one process or, with ``--nproc_per_node``, through torchrun.

    Args:
        argv (Sequence[str]): the command line of `tune run`, without "tune".

    Returns:
        int: exit code; what went wrong has been said.

    Raises:
        UserError: words are missing, or stand where they are not read.
        ChildFailedError: torchrun's report, where PACT_TUNE_DEBUG=1 asks for tracebacks.
    """
    sys.argv = ["tune", *argv]  # torchtune counts its words
    args = _parsed(argv)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    if not log.debugging():
        for name in TALKATIVE:
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        args.func(args)
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


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as torchtune's own parser reads it; what it says with a long usage is a sentence here."""
    words = argv[1:]
    if not {"--config", "-h", "--help"} & set(words):
        missing = "a config" if any(not word.startswith("-") for word in words) else "a recipe and a config"
        raise UserError(f"`pact run` needs {missing}: {SHAPE}.")
    parser = Parser(prog="pact")
    tune.Run.create(parser.add_subparsers())
    args, misplaced = parser.parse_known_args(argv)
    if misplaced:
        raise UserError(f"'{misplaced[0]}' stands before the recipe's name and is no option of torchrun's: {SHAPE}.")
    if "--config" in args.recipe_args[-1:]:
        raise UserError(f"--config stands without a name: {SHAPE}.")
    if not _is_recipe(args.recipe):
        raise unknown_name("recipe, and no file or module either", args.recipe, [RECIPE])
    return args


def _is_recipe(name: str) -> bool:
    """Whether torchtune would find it: one of its own, a file, or a module, as the recipe of this package is."""
    own = {recipe.name for recipe in get_all_recipes()}
    stem = os.path.splitext(name)[0]
    top = stem.partition(".")[0]
    return name in own or Path(f"{stem}.py").is_file() or (top.isidentifier() and find_spec(top) is not None)


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
