"""Anchored SFT (arXiv 2509.23753): cross-entropy weighted by the label's probability, and KL over the whole vocabulary.

The paper abbreviates it ASFT, which is another method than AsFT (:mod:`pact_tune.objectives.asft`).
"""

import torch

from pact_tune.config import Weight
from pact_tune.losses import kl_divergence, probability_weighted_loss
from pact_tune.objectives.base import Chunk, Context, Objective
from pact_tune.reference.readings import Vocabulary


def anchored_sft(context: Context, lambda_kl: Weight = 0.1) -> Objective:
    """Anchored SFT: p(label), a constant, times the cross-entropy, plus lambda_kl * KL(reference || student).

    Args:
        context (Context): of the run.
        lambda_kl (float): weight of the KL.

    Returns:
        Objective: "weighted_ce" + lambda_kl * "kl"; the plain "ce" is logged.
    """

    def terms(chunk: Chunk) -> dict[str, torch.Tensor]:
        weighted = probability_weighted_loss(chunk.label_logprobs)
        kl = kl_divergence(chunk.student, chunk.reference["full"])
        return {
            "weighted_ce": (weighted * chunk.ce_weight).sum(),
            "kl": (kl * chunk.weight).sum(),
            "ce": chunk.ce,
        }

    return Objective(
        settings={"method": "anchored_sft", "constrained": True, "lambda_kl": lambda_kl},
        terms=terms,
        coefficients={"weighted_ce": 1.0, "kl": lambda_kl},
        metrics=("ce",),
        reading=Vocabulary(),
        views=("full",),
        notes=("Objective: anchored SFT.",),
    )
