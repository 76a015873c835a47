"""The losses, as pure functions of flat tensors; they know no model and no trainer.

Shapes: T = all response tokens of a batch, concatenated; K = safety tokens; C = columns, K or, with the tail, K + 1.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field

from pact_tune.config import Count, Natural, Number, Weight, check, refuse, settings
from pact_tune.errors import UserError, unknown_name
from pact_tune.safety_tokens import Ranking, Weighting

Temperature = Annotated[Number, Field(gt=0, le=1e3)]
Threshold = Annotated[Number, Field(gt=0, le=1)]
Slope = Annotated[Number, Field(ge=-1e6, le=1e6)]
Decay = Annotated[float, Field(gt=0, allow_inf_nan=True, description="a number above 0, or .inf for no decay")]
VOCABULARY: Final = "vocabulary"  # k: every token is a safety token (the full-vocabulary KL of the paper's Table 5)


@dataclass(frozen=True)
class PACTConfig:
    """Every knob of the PACT loss (arXiv 2603.07445); the defaults are the paper's.

    Attributes:
        k (int | Literal["vocabulary"] | None): how many safety tokens at most (K); None takes all that the file holds,
            "vocabulary" every token (first row of Table 5).
        ranking (Ranking): S = top-K by d(v), "score" (section 3.1), or by "reference_probability" (released code).
        weighting (Weighting): V_safety = "raw" d(v) (Eq. 3), "centred" (released code) or "uniform".
        tail (bool): one more column, the log-sum-exp of all logits outside S, on both sides: the loss then constrains
            the probability that S receives, not only the proportions inside S. Goes with uniform weights only.
        direction (Literal["forward", "reverse"]): of the KL; KL(reference || student) as in Eq. 4, or KL(student ||
            reference) (ours), which goes with uniform weights only.
        temperature (float): divides the logits of both sides; the loss is multiplied by its square (released code: 2).
        lambda_kl (float): weight of the KL beside the cross-entropy (Eq. 9); 0 is plain SFT.
        response_only (bool): mix in the reference's response-only view (Eq. 6-8).
        response_only_bos (bool): that view begins with BOS where the chat template does (released code: no BOS).
        gate (bool): gate by the gap of Eq. 5-6; False mixes with the constant sigmoid(-gate_slope * gate_bias).
        gate_threshold (float): probability mass that Eq. 5 covers.
        gate_slope (float): slope of the sigmoid in Eq. 6 (released code: 2).
        gate_bias (float): subtracted from the gap in Eq. 6.
        decay_start (int): N of Eq. 8, in response positions.
        tau (float): tau of Eq. 8, in response positions; infinity switches the decay off.
    """

    k: Count | Literal["vocabulary"] | None = 50
    ranking: Ranking = "score"
    weighting: Weighting = "raw"
    tail: bool = False
    direction: Literal["forward", "reverse"] = "forward"
    temperature: Temperature = 1.0
    lambda_kl: Weight = 3.0
    response_only: bool = True
    response_only_bos: bool = True
    gate: bool = True
    gate_threshold: Threshold = 0.9
    gate_slope: Slope = 1.0
    gate_bias: Slope = 0.0
    decay_start: Natural = 8
    tau: Decay = 8.0

    def __post_init__(self) -> None:
        refuse(check(PACTConfig, dataclasses.asdict(self), "loss"))
        for key, chosen in {"loss.tail": self.tail, "loss.direction: reverse": self.direction == "reverse"}.items():
            if chosen and self.weighting != "uniform":
                raise UserError(
                    f"{key} goes with uniform weights only, and weighting is '{self.weighting}': set weighting: uniform, "
                    "or use preset: tail."
                )
        if self.k == VOCABULARY and (self.tail or self.weighting != "uniform"):
            raise UserError("loss.k: vocabulary leaves no tail and has no scores: set tail: False, weighting: uniform.")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "PACTConfig":
        """A named set of values, single ones of which may be overridden.

        Args:
            name (str): "paper" (the text, version 1), "official" (what the released code computes) or "tail".
            **overrides: fields of this class.

        Returns:
            PACTConfig: the values.

        Raises:
            UserError: unknown preset, or a field that does not exist.
        """
        if name not in PRESETS:
            raise unknown_name("value of loss.preset", str(name), PRESETS)
        return cls(**(PRESETS[name] | settings(cls, overrides, "loss")))


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "official": {
        "ranking": "reference_probability",
        "weighting": "centred",
        "temperature": 2.0,
        "lambda_kl": 1.0,
        "gate_slope": 2.0,
        "response_only_bos": False,
    },
    "tail": {"tail": True, "weighting": "uniform", "response_only": False},
}


class PACTLoss(NamedTuple):
    """What :func:`pact_loss` returns.

    Attributes:
        sum (torch.Tensor): sum over all positions of the KL (before lambda), scalar, nats.
        per_token (torch.Tensor): the KL at each position, ``[T]``, nats.
        gate (torch.Tensor): decayed gate c~_t of Eq. 8, ``[T]``; 0 with the response-only view off.
    """

    sum: torch.Tensor
    per_token: torch.Tensor
    gate: torch.Tensor


def pact_loss(
    student: torch.Tensor,
    reference_full: torch.Tensor,
    reference_response_only: torch.Tensor | None,
    position: torch.Tensor,
    weights: torch.Tensor,
    config: PACTConfig,
) -> PACTLoss:
    """PACT's KL between the re-weighted reference and the student on the safety tokens (paper, Eq. 3-8).

    Computed in float32, or in float64 when ``student`` is. The reference side is a constant: gradients flow into ``student`` alone, and not through the gate. With raw or
    centred weights the KL is not 0 when student and reference agree, since only the reference side is re-weighted
    (Eq. 3); with uniform weights it is.

    Args:
        student (torch.Tensor): logits of the model in training, ``[T, K]``; with ``config.tail`` ``[T, K+1]``, the last
            column being the log-sum-exp of the logits outside S.
        reference_full (torch.Tensor): logits of the frozen aligned model with the whole conversation, same shape.
        reference_response_only (torch.Tensor | None): its logits with the response only, same shape; None with
            ``config.response_only`` off.
        position (torch.Tensor): t, counted from 0 at the start of each response, ``[T]``.
        weights (torch.Tensor): V_safety on S, ``[K]``; unused with the tail, whose weights are uniform.
        config (PACTConfig): the knobs.

    Returns:
        PACTLoss: sum, per token and gate. With T = 0 the sum is 0 and still part of the graph.

    Raises:
        ValueError: shapes that do not belong together.
    """
    k = student.shape[-1] - config.tail
    if reference_full.shape != student.shape or weights.shape != (k,):
        raise ValueError(
            f"student {tuple(student.shape)}, reference {tuple(reference_full.shape)} and weights "
            f"{tuple(weights.shape)} do not belong together (tail={config.tail})"
        )
    student = at_least_float32(student)
    with torch.no_grad():
        target = reference_full.to(student.dtype)
        gate = target.new_zeros(position.shape)
        if config.response_only:
            if reference_response_only is None:
                raise ValueError("config.response_only needs the reference's response-only view")
            response_only = reference_response_only.to(student.dtype)
            gate = _gate(student[:, :k], response_only[:, :k], position, config)
            # Eq. 7, in the form that is exact when both views agree
            target = torch.lerp(target, response_only, gate[:, None])
        target = target / config.temperature
        if not config.tail:
            target = target + weights.to(target.dtype).log()  # Eq. 3; a weight of 0 gives -inf, that is probability 0
        log_q = F.log_softmax(target, dim=-1)
        q = log_q.exp()
    log_p = F.log_softmax(student / config.temperature, dim=-1)
    if config.direction == "reverse":
        divergence = token_kl(log_p, log_q)
    else:
        negative_entropy = torch.where(q > 0, q * log_q, 0.0).sum(-1)
        divergence = negative_entropy - (q * log_p).sum(-1)  # Eq. 4
    per_token = config.temperature**2 * divergence
    return PACTLoss(per_token.sum(), per_token, gate)


def dispersion(logits: torch.Tensor, threshold: float) -> torch.Tensor:
    """I_p(t) of Eq. 5: the share of the safety tokens needed to cover ``threshold`` of the mass on S.

    Args:
        logits (torch.Tensor): logits on S, ``[T, K]``.
        threshold (float): mass to cover, 0.9 in the paper.

    Returns:
        torch.Tensor: ``[T]``, values in {1/K, ..., 1}.
    """
    cumulative = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    # Rounding may leave the full sum a hair below 1: never more than K tokens.
    needed = (cumulative < threshold).sum(-1).clamp(max=logits.shape[-1] - 1) + 1
    return needed.to(logits.dtype) / logits.shape[-1]


def _gate(
    student: torch.Tensor, response_only: torch.Tensor, position: torch.Tensor, config: PACTConfig
) -> torch.Tensor:
    """c~_t of Eq. 6 and 8, ``[T]``, from logits on S, ``[T, K]``."""
    gap = torch.zeros_like(student[:, 0])
    if config.gate:
        gap = dispersion(student, config.gate_threshold) - dispersion(response_only, config.gate_threshold)
    gate = torch.sigmoid(config.gate_slope * (gap - config.gate_bias))
    return gate * torch.exp(-(position.to(gate.dtype) - config.decay_start).clamp(min=0) / config.tau)


StrSpace = Literal["logit", "logprob", "centered"]


def str_loss(student: torch.Tensor, reference: torch.Tensor, space: StrSpace = "logit") -> torch.Tensor:
    """STR (arXiv 2604.17210), our reading of its abstract: squared difference of the refusal tokens' logits.

    Raw logits are not shift-invariant: a constant added to all of them leaves the softmax as it is and is penalised. The
    other two spaces are.

    Args:
        student (torch.Tensor): logits of the model in training on S, ``[T, K]``; for "logprob" ``[T, K+1]``, the last column
            being the log-sum-exp of the logits outside S, which gives the normaliser.
        reference (torch.Tensor): those of the frozen aligned model in the same context, same shape.
        space (StrSpace): compare raw logits, log-probabilities, or logits less their mean on S.

    Returns:
        torch.Tensor: per token, mean over S, ``[T]``.
    """
    one, other = (_in_space(at_least_float32(columns), space) for columns in (student, reference))
    return (one - other).square().mean(-1)


def _in_space(columns: torch.Tensor, space: StrSpace) -> torch.Tensor:
    if space == "logprob":
        return columns.log_softmax(-1)[:, :-1]
    return columns - columns.mean(-1, keepdim=True) if space == "centered" else columns


def token_kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) at each position, from log-probabilities.

    Args:
        reference (torch.Tensor): ``[..., V]``.
        other (torch.Tensor): ``[..., V]``.

    Returns:
        torch.Tensor: ``[...]``, in nats.
    """
    return (reference.exp() * (reference - other)).sum(-1)


def kl_divergence(student: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """KL(reference || student) of two categorical distributions; no gradient flows into the reference.

    Args:
        student (torch.Tensor): logits of the model in training, ``[T, C]``.
        reference (torch.Tensor): logits of the frozen aligned model, same shape.

    Returns:
        torch.Tensor: per token, ``[T]``, nats.
    """
    log_p = at_least_float32(student).log_softmax(-1)
    log_q = reference.detach().to(log_p.dtype).log_softmax(-1)
    return token_kl(log_q, log_p)


def probability_weighted_loss(label_logprobs: torch.Tensor) -> torch.Tensor:
    """Cross-entropy times the label's probability, which is a constant here (the first term of arXiv 2509.23753).

    What the student finds unlikely is learned slowly: the gradient is that of ``-p`` and not of ``-log p``.

    Args:
        label_logprobs (torch.Tensor): the student's log-probability of the true next token, ``[T]``, nats.

    Returns:
        torch.Tensor: per token, ``[T]``, nats.
    """
    logprobs = at_least_float32(label_logprobs)
    return -logprobs.detach().exp() * logprobs


def constrained_sft_betas(
    position: torch.Tensor, beta: float, first_token_factor: float, bias_factor: float, bias_length: int
) -> torch.Tensor:
    """beta_t of constrained SFT (arXiv 2406.05946, section 4.1) with the schedule of its released code.

    Args:
        position (torch.Tensor): t, counted from 0 at the start of each response, ``[T]``.
        beta (float): from position ``bias_length`` on.
        first_token_factor (float): of beta at position 0.
        bias_factor (float): of beta at positions 1 to ``bias_length - 1``.
        bias_length (int): positions with a factor.

    Returns:
        torch.Tensor: ``[T]`` float32.
    """
    betas = torch.full_like(position, beta, dtype=torch.float32)
    betas = torch.where(position < bias_length, beta * bias_factor, betas)
    return torch.where((position == 0) & (bias_length > 0), beta * first_token_factor, betas)


def constrained_sft_loss(
    label_logprobs: torch.Tensor, reference_label_logprobs: torch.Tensor, beta: torch.Tensor
) -> torch.Tensor:
    """Constrained SFT (arXiv 2406.05946, Eq. 3): cross-entropy whose weight falls as the student leaves the reference.

    The gradient is that of ``-(2 / beta) log sigmoid(beta (log pi - log pi_aligned))``, which is the cross-entropy's times
    ``w = 2 (1 - sigmoid(beta (log pi - log pi_aligned)))``; w is a constant here, and at least 0.001, as in the released
    code, so that the value is the cross-entropy's while student and reference agree.

    Args:
        label_logprobs (torch.Tensor): the student's log-probability of the true next token, ``[T]``, nats.
        reference_label_logprobs (torch.Tensor): the frozen aligned model's, ``[T]``.
        beta (torch.Tensor): strength at each position, ``[T]``.

    Returns:
        torch.Tensor: per token, ``[T]``, nats.
    """
    student = at_least_float32(label_logprobs)
    with torch.no_grad():
        gap = student - at_least_float32(reference_label_logprobs)
        weight = (2 * torch.sigmoid(-beta * gap)).clamp(min=1e-3)
    return -weight * student


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
