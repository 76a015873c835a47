"""What alignment did to a weight, V = W_aligned - W_base, and the projection onto it that AsFT and SafeLoRA share."""

from collections.abc import Iterator

import torch

from pact_tune.errors import UserError
from pact_tune.objectives.base import Context
from pact_tune.weights import ModelFolder


def alignment_directions(context: Context, base: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """V of each module with an adapter, one at a time; biases have none.

    Args:
        context (Context): of the run.
        base (str): folder of the base model that the aligned one was made from.

    Yields:
        tuple[str, str, torch.Tensor]: the module's name, the trainer's and Hugging Face's, and V ``[out, in]`` float32 with
            Hugging Face's order of rows, on the CPU.

    Raises:
        UserError: no such checkpoint, one of another network, no adapter to constrain, or a module that alignment left as
            it was.
    """
    aligned = context.aligned
    if aligned is None or not context.adapted:
        raise UserError(
            "This loss constrains the adapter's weights and compares the checkpoint's with the base model's, and there is no "
            "adapter, or no checkpoint folder: train a LoRA adapter on a checkpoint in a folder, or take another loss."
        )
    folder = ModelFolder(base, "loss.base")
    for name, module in context.adapted.items():
        weight = f"{module}.weight"
        shapes = [of.shape(weight) if weight in of else "missing" for of in (aligned, folder)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"The model in '{base}' is not the base of the one in '{aligned.directory}': {weight} is {shapes[1]} there and "
                f"{shapes[0]} here; set loss.base to the model that the aligned one was made from."
            )
        direction = aligned[weight].float() - folder[weight].float()
        if not direction.any():
            raise UserError(
                f"{weight} is the same in '{base}' and in '{aligned.directory}', so alignment has no direction there: set "
                "loss.base to the model before its alignment, and put the adapter on modules that alignment changed."
            )
        yield name, module, direction


def project(direction: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """C B with C = V V^T / ||V||_F, which is ``[out, out]`` and never formed.

    Args:
        direction (torch.Tensor): V, ``[out, in]``.
        b (torch.Tensor): B, ``[out, rank]``.

    Returns:
        torch.Tensor: ``[out, rank]``.
    """
    return direction @ (direction.T @ b) / torch.linalg.norm(direction)


def inner(b: torch.Tensor, other: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """<B A, B' A> (Frobenius), from ``[rank, rank]`` matrices; b and other are ``[out, rank]``, a ``[rank, in]``."""
    return ((b.T @ other) * (a @ a.T)).sum()
