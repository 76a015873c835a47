"""STR (arXiv 2604.17210), our reading of its abstract: cross-entropy + lambda_str * squared logit difference."""

import torch

from pact_tune.config import PathText, Text, Weight
from pact_tune.fingerprints import fingerprint
from pact_tune.losses import StrSpace, str_loss
from pact_tune.objectives.base import Chunk, Context, Objective
from pact_tune.objectives.sft import sft
from pact_tune.objectives.tokens import TokenSource
from pact_tune.reference.readings import Columns


def str_(
    context: Context,
    safety_tokens: Text,
    lambda_str: Weight = 0.1,
    space: StrSpace = "logit",
    revision: Text | None = None,
    subfolder: PathText | None = None,
    template_fallback: bool = False,
) -> Objective:
    """STR (our reading), or plain SFT when lambda_str is 0.

    Args:
        context (Context): of the run.
        safety_tokens (str): folder, Hub repository or known name of the refusal tokens; all of them are used.
        lambda_str (float): weight of the constraint; 0.1 is our choice, the paper's text was not available.
        space (StrSpace): what is compared: raw "logit"s, "logprob"s, or logits less their mean on S, "centered".
        revision (str | None): of the Hub repository.
        subfolder (str | None): of the folder or repository.
        template_fallback (bool): take tokens from refusal templates where nobody has published a known name's.

    Returns:
        Objective: "ce" + lambda_str * "str".
    """
    if lambda_str == 0:
        return sft(context)
    tokens, text = TokenSource(safety_tokens, revision, subfolder, template_fallback).load(context)
    known = fingerprint({"ids": tokens.ids, "weights": tokens.weights})

    def terms(chunk: Chunk) -> dict[str, torch.Tensor]:
        difference = str_loss(chunk.student, chunk.reference["full"], space)
        return {"ce": chunk.ce, "str": (difference * chunk.weight).sum()}

    return Objective(
        settings={
            "method": "str",
            "constrained": True,
            "safety_tokens": known,
            "lambda_str": lambda_str,
            "space": space,
        },
        terms=terms,
        coefficients={"ce": 1.0, "str": lambda_str},
        reading=Columns(tokens.ids.to(context.device), tail=space == "logprob"),
        views=("full",),
        notes=(f"Safety tokens: {len(tokens)} {text}",),
    )
