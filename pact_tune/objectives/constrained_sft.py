"""Constrained SFT (Qi et al., arXiv 2406.05946): a token stops being learned once the student finds it likelier than the
aligned model does, and early the first tokens of a response, where refusals are decided."""

import torch

from pact_tune.config import Natural, Positive
from pact_tune.losses import constrained_sft_betas, constrained_sft_loss
from pact_tune.objectives.base import Chunk, Context, Objective
from pact_tune.reference.readings import LabelLogprob


def constrained_sft(
    context: Context,
    beta: Positive = 0.1,
    first_token_factor: Positive = 5.0,
    bias_factor: Positive = 20.0,
    bias_length: Natural = 5,
) -> Objective:
    """Constrained SFT with the published schedule: beta_1 = 0.5, beta_2 to beta_5 = 2, then 0.1.

    The published runs have Adam's beta1 at 0.5 (``optimizer.betas: [0.5, 0.999]``).

    Args:
        context (Context): of the run.
        beta (float): strength after the first ``bias_length`` tokens of a response.
        first_token_factor (float): of beta at the first token.
        bias_factor (float): of beta at the second to the last of the first ``bias_length`` tokens.
        bias_length (int): response tokens with a factor.

    Returns:
        Objective: "constrained_ce"; the plain "ce" is logged.
    """

    def terms(chunk: Chunk) -> dict[str, torch.Tensor]:
        betas = constrained_sft_betas(chunk.position, beta, first_token_factor, bias_factor, bias_length)
        betas = betas * chunk.weight  # 0 is plain cross-entropy, for rows that are not constrained
        loss = constrained_sft_loss(chunk.label_logprobs, chunk.reference["full"][:, 0], betas)
        return {"constrained_ce": (loss * chunk.ce_weight).sum(), "ce": chunk.ce}

    return Objective(
        settings={
            "method": "constrained_sft", "constrained": True, "beta": beta, "first_token_factor": first_token_factor,
            "bias_factor": bias_factor, "bias_length": bias_length,
        },
        terms=terms,
        coefficients={"constrained_ce": 1.0},
        metrics=("ce",),
        reading=LabelLogprob(),
        views=("full",),
        notes=("Objective: constrained SFT.",),
    )  # fmt: skip
