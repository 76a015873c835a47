"""`recipe_state.pt`: all that a resumption needs, in one file that is replaced as a whole and checked before use."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pact_tune.errors import UserError
from pact_tune.files import atomic_file
from pact_tune.objectives.base import Objective

STATE_FILE = "recipe_state.pt"
FORMAT = 2


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Writes the state of a run.

    Args:
        directory (Path): the run's output folder.
        state (dict[str, Any]): trained weights, optimizer, scheduler, step, the run's identity and the objective's state.
    """
    with atomic_file(directory / STATE_FILE) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_state(directory: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Reads the state of a run that is to be resumed.

    Args:
        directory (Path): the run's output folder.
        identity (dict[str, Any]): what must not change between a run and its resumption, as it is now.

    Returns:
        dict[str, Any]: what :func:`save_state` was given.

    Raises:
        UserError: there is none, it is damaged or of another version, or it belongs to a run with other data or settings.
    """
    path = directory / STATE_FILE
    if not path.is_file():
        raise UserError(f"There is no {STATE_FILE} in '{directory}' to resume from: set resume_from_checkpoint: False.")
    start_anew = f"remove it and start anew, with resume_from_checkpoint: False, from the last result in '{directory}'"
    try:
        with zipfile.ZipFile(path) as archive:  # which is what torch writes; each part has a checksum
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} has another checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state.get("format", 1)
    except Exception as error:  # whatever torch's and zipfile's readers stumble over
        raise UserError(f"'{path}' is damaged ({str(error).splitlines()[0]}): {start_anew}.") from error
    if version != FORMAT:
        raise UserError(
            f"'{path}' has format {version}, this pact-tune reads {FORMAT}: resume with the version that wrote it, or "
            f"{start_anew}."
        )
    then = state["identity"]
    for key in sorted(then.keys() | identity.keys()):
        if then.get(key) != identity.get(key):
            raise UserError(
                f"The run in '{directory}' cannot be resumed with this config: its {key} was {then.get(key)}, now it is "
                f"{identity.get(key)}."
            )
    return state


def capture(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, objective: Objective
) -> dict[str, Any]:
    """What moves during a run beside the trained weights, whole and on the CPU; all ranks must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "objective": None if objective.state is None else objective.state.state_dict(),
        "coefficients": dict(objective.coefficients),
    }


def restore(
    state: dict[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    objective: Objective,
    distributed: bool,
) -> None:
    """Puts back what :func:`capture` returned.

    Args:
        state (dict[str, Any]): from :func:`load_state`.
        model (nn.Module): sharded or not.
        optimizer (Optimizer): of its trained weights.
        scheduler (LRScheduler | None): of the learning rate.
        objective (Objective): of the run.
        distributed (bool): several processes; all must call it.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=distributed)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    if objective.state is not None:
        objective.state.load_state_dict(state["objective"])
    objective.coefficients.update(state["coefficients"])
