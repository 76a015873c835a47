"""SafeLoRA (arXiv 2405.16833): after training, updates that leave the direction of alignment are projected onto it."""

import dataclasses
from typing import Annotated, Literal

import torch
from pydantic import Field

from pact_tune.config import Count, Number, PathText
from pact_tune.log import logger
from pact_tune.objectives.alignment import alignment_directions, inner, project
from pact_tune.objectives.base import Context, Objective
from pact_tune.objectives.sft import sft

Cosine = Annotated[Number, Field(ge=-1, le=1)]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # (A, B) of each module


def safelora(
    context: Context,
    base: PathText,
    select: Literal["number", "threshold"] = "number",
    number: Count = 10,
    threshold: Cosine = 0.5,
) -> Objective:
    """Plain SFT, and at each export B <- C B, C = V V^T / ||V||_F, in the modules where B A fits that least.

    What is exported is projected; training goes on with the weights as they were.

    Args:
        context (Context): of the run.
        base (str): folder of the base model that the aligned one was made from.
        select (str): project the "number" modules of the smallest cosine between C B A and B A, or those whose cosine is
            at most the "threshold".
        number (int): of modules (q_proj and v_proj of a layer are two).
        threshold (float): of the cosine.

    Returns:
        Objective: of plain SFT, with a last word on the adapter.

    Raises:
        UserError: see :func:`pact_tune.objectives.alignment.alignment_directions`.
    """
    for _ in alignment_directions(context, base):  # what is wrong with it must not be found after the training
        pass

    def finish(adapter: Factors) -> Factors:
        projected, cosines = dict(adapter), {}
        for own, module, direction in alignment_directions(context, base):
            module = module if module in adapter else own  # where a checkpoint has older names than its model
            a, b = (factor.to(context.device, torch.float32) for factor in adapter[module])
            inside = project(direction.to(context.device), b)
            cosine = inner(inside, b, a) / (inner(inside, inside, a) * inner(b, b, a)).sqrt()
            if cosine.isfinite():  # an update of zero has no direction
                cosines[module] = cosine.item()
                projected[module] = adapter[module][0], inside.to(adapter[module][1])
        chosen = sorted(cosines, key=lambda module: cosines[module])
        if select == "number":
            chosen = chosen[:number]
        else:
            chosen = [module for module in chosen if round(cosines[module], 5) <= threshold]
        logger.info(f"SafeLoRA: {len(chosen)} of {len(adapter)} modules are projected.")
        return {module: projected[module] if module in chosen else adapter[module] for module in adapter}

    settings = {"method": "safelora", "constrained": True, "base": base, "select": select}
    settings |= {"number": number} if select == "number" else {"threshold": threshold}
    return dataclasses.replace(
        sft(context),
        settings=settings,
        finish=finish,
        notes=("Objective: plain SFT, projected at the end (SafeLoRA).",),
    )
