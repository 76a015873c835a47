"""PACT (arXiv 2603.07445): cross-entropy + lambda_kl * KL on the safety tokens; and its tail variant."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from pact_tune.config import Fields, Number, PathText, Text
from pact_tune.errors import UserError
from pact_tune.fingerprints import fingerprint
from pact_tune.losses import VOCABULARY, PACTConfig, pact_loss
from pact_tune.objectives.base import Chunk, Context, Objective
from pact_tune.objectives.controller import Budget
from pact_tune.objectives.sft import sft
from pact_tune.objectives.tokens import TokenSource
from pact_tune.reference.readings import Columns, Reading, Vocabulary
from pact_tune.scoring import POSITION_RANGES

# Beyond the response position where the mixing weight of Eq. 8 has fallen to this, the response-only view is left out.
NEGLIGIBLE_GATE = 1e-3
KLBudget = Annotated[Number, Field(gt=0, le=100)]


def _config(
    safety_tokens: Text | None = None,
    preset: Literal["paper", "official", "tail"] = "paper",
    kl_budget: KLBudget | None = None,
    **overrides: Annotated[Any, Fields(PACTConfig)],
) -> PACTConfig:
    """The knobs, once they agree with each other; `pact validate` calls this too."""
    config = PACTConfig.preset(preset, **overrides)
    if safety_tokens is None and config.k != VOCABULARY and config.lambda_kl > 0:
        raise UserError(
            "Section 'loss' names no safety_tokens: give a folder made by `pact tokens compute`, a Hub repository, "
            "or a known model name."
        )
    if kl_budget is not None and config.lambda_kl == 0:
        raise UserError(
            "loss.kl_budget finds lambda_kl during the run, and lambda_kl: 0 is no constraint: leave one of the two out."
        )
    return config


def pact(
    context: Context,
    safety_tokens: Text | None = None,
    preset: Literal["paper", "official", "tail"] = "paper",
    revision: Text | None = None,
    subfolder: PathText | None = None,
    template_fallback: bool = False,
    kl_budget: KLBudget | None = None,
    **overrides: Annotated[Any, Fields(PACTConfig, _config)],
) -> Objective:
    """PACT (Eq. 9), or plain SFT when lambda_kl is 0: no reference is run then, and the numbers are the same bit for bit.

    Args:
        context (Context): of the run.
        safety_tokens (str | None): folder, Hub repository or known name; None only with ``k: vocabulary``.
        preset (str): "paper", "official" or "tail".
        revision (str | None): of the Hub repository.
        subfolder (str | None): of the folder or repository.
        template_fallback (bool): take tokens from refusal templates where nobody has published a known name's.
        kl_budget (float | None): what the mean "kl" of a response token may be, nats: lambda_kl starts at its own value and
            is found during the run (:class:`pact_tune.objectives.controller.Budget`). None: lambda_kl is fixed.
        **overrides: fields of :class:`pact_tune.PACTConfig`.

    Returns:
        Objective: "ce" + lambda_kl * "kl"; the mean "gate" is logged.

    Raises:
        UserError: unknown preset or field, a value out of range, or no safety tokens named, found or fitting.
    """
    config = _config(safety_tokens, preset, kl_budget, **overrides)
    if config.lambda_kl == 0:
        return sft(context)
    reading: Reading
    if config.k == VOCABULARY:
        reading, weights, known = Vocabulary(), torch.ones(context.vocab_size, device=context.device), None
        note = f"Safety tokens: all {context.vocab_size} of the vocabulary."
    else:
        assert safety_tokens is not None  # see _config
        found, text = TokenSource(safety_tokens, revision, subfolder, template_fallback).load(context)
        chosen = found.select(config.k, config.ranking, config.weighting)
        reading = Columns(chosen.ids.to(context.device), config.tail)
        weights = chosen.weights.to(context.device)
        known = fingerprint({"ids": chosen.ids, "weights": chosen.weights})
        note = f"Safety tokens: {len(chosen)} {text}"

    def terms(chunk: Chunk) -> dict[str, torch.Tensor]:
        full, response_only = chunk.reference["full"], chunk.reference.get("response_only")
        kl = pact_loss(chunk.student, full, response_only, chunk.position, weights, config)
        return {"ce": chunk.ce, "kl": (kl.per_token * chunk.weight).sum(), "gate": (kl.gate * chunk.weight).sum()}

    settings = dataclasses.asdict(config) | {"tau": str(config.tau)}  # JSON has no infinity
    tokens_needed = None
    if config.tau < math.inf:
        tokens_needed = config.decay_start + math.ceil(config.tau * math.log(1 / NEGLIGIBLE_GATE))
    coefficients = {"ce": 1.0, "kl": config.lambda_kl}
    budget = None if kl_budget is None else Budget(coefficients, "kl", kl_budget)
    return Objective(
        settings={"method": "pact", "constrained": True, "safety_tokens": known, **settings, "kl_budget": kl_budget},
        terms=terms,
        coefficients=coefficients,
        metrics=("gate",),
        reading=reading,
        views=("full", "response_only") if config.response_only else ("full",),
        response_only_bos=config.response_only_bos,
        response_only_tokens=tokens_needed,
        notes=(note,),
        report=report_mass if config.tail else None,
        after_step=budget.after_step if budget else None,
        state=budget,
    )


def report_mass(samples: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[str]:
    """Says how much probability the reference gives to S on the training rows (with the tail alone it is known).

    Much of it at position 0 means that the rows begin unlike the aligned model's own answers, or that S holds mere
    style tokens: the constraint will then fight the task.

    Args:
        samples (Iterable[tuple[torch.Tensor, torch.Tensor]]): columns of the full view with the tail, ``[T, K+1]``, and
            response positions ``[T]``, of some batches.

    Returns:
        list[str]: lines for the log.
    """
    total, count = torch.zeros(len(POSITION_RANGES)), torch.zeros(len(POSITION_RANGES))
    for full, position in samples:
        mass = 1 - full.softmax(-1)[:, -1]
        for i, (start, end) in enumerate(POSITION_RANGES.values()):
            inside = (position >= start) & (position < (end or torch.inf))
            total[i] += mass[inside].sum()
            count[i] += inside.sum()
    shares = dict(zip(POSITION_RANGES, (total / count.clamp(min=1)).tolist(), strict=True))
    text = ", ".join(f"{name}: {share:.3f}" for name, share in shares.items())
    lines = [f"Reference's mean probability mass on the safety tokens, by response position: {text}"]
    if shares["0"] > 0.5:
        lines.append(
            "WARNING: more than half of the mass at response position 0 lies on the safety tokens: the training "
            "rows begin unlike the aligned model's own answers, or the safety tokens include mere style tokens; "
            "the constraint will fight the task (see docs/method.md, 'When the constraint fights the task')."
        )
    return lines
