"""AsFT (arXiv 2506.08473): the adapter's update is penalised outside the direction in which alignment moved each weight."""

import torch

from pact_tune.config import PathText, Weight
from pact_tune.objectives.alignment import alignment_directions, inner, project
from pact_tune.objectives.base import Chunk, Context, Objective
from pact_tune.objectives.sft import sft


def asft(context: Context, base: PathText, lambda_asft: Weight = 1.0) -> Objective:
    """AsFT: cross-entropy + lambda_asft * the sum over modules of ||(I - C) B A||_F^2, C = V V^T / ||V||_F.

    V = W_aligned - W_base is held on the device, whole on every process, in the checkpoint's own type.

    Args:
        context (Context): of the run.
        base (str): folder of the base model that the aligned one was made from.
        lambda_asft (float): weight of the penalty; 1 in the released scripts, 0 is plain SFT.

    Returns:
        Objective: "ce", and the penalty.

    Raises:
        UserError: see :func:`pact_tune.objectives.alignment.alignment_directions`.
    """
    if lambda_asft == 0:
        return sft(context)
    directions = {}
    for name, module, direction in alignment_directions(context, base):
        assert context.aligned is not None
        dtype = context.aligned[f"{module}.weight"].dtype
        directions[name] = context.own_rows(module, direction).to(context.device, dtype)

    def terms(chunk: Chunk) -> dict[str, torch.Tensor]:
        return {"ce": chunk.ce}

    def penalty(module: str, trained: dict[str, torch.Tensor]) -> torch.Tensor:
        a, b = trained["lora_a.weight"].float(), trained["lora_b.weight"].float()
        outside = b - project(directions[module].float(), b)
        return lambda_asft * inner(outside, outside, a)

    return Objective(
        settings={"method": "asft", "constrained": True, "lambda_asft": lambda_asft, "base": base},
        terms=terms,
        coefficients={"ce": 1.0},
        penalty=penalty,
        notes=(f"Objective: AsFT, on {len(directions)} modules.",),
    )
