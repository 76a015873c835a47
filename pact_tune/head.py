"""From hidden states at response positions to the few numbers that losses need, without holding all logits.

Shapes: T = response tokens of the batch, H = hidden size, V = vocabulary, K = safety tokens, C = K or K + 1 columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

CHUNK = (
    256  # rows whose logits exist at a time; 256 x 152k fp32 logits are 156 MB, and the head is streamed T/256 times
)


@dataclass(frozen=True)
class Columns:
    """Which logits a constraint looks at.

    Attributes:
        ids (torch.Tensor): safety token ids, ``[K]`` int64.
        tail (bool): append the log-sum-exp of the logits of all other tokens.
    """

    ids: torch.Tensor
    tail: bool

    @property
    def width(self) -> int:
        return self.ids.numel() + self.tail


class Readout(NamedTuple):
    """What a loss sees of the model at n response positions.

    Attributes:
        label_logprobs (torch.Tensor): log-probability of the true next token, ``[n]`` float32, nats.
        columns (torch.Tensor | None): logits on S and, where asked for, the tail, ``[n, C]`` float32.
    """

    label_logprobs: torch.Tensor
    columns: torch.Tensor | None


def read_columns(logits: torch.Tensor, columns: Columns) -> torch.Tensor:
    """The safety columns of full logits.

    The tail is a log-sum-exp over the complement of S, never log(1 - mass): that subtraction has no digits left where
    S holds nearly all the mass.

    Args:
        logits (torch.Tensor): ``[n, V]`` float32.
        columns (Columns): what to read.

    Returns:
        torch.Tensor: ``[n, C]``.
    """
    safety = logits.index_select(1, columns.ids)
    if not columns.tail:
        return safety
    tail = logits.index_fill(1, columns.ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([safety, tail], dim=1)


def read_logits(logits: torch.Tensor, labels: torch.Tensor, columns: Columns | None) -> Readout:
    """Label log-probabilities and safety columns of full logits.

    Args:
        logits (torch.Tensor): ``[n, V]`` float32.
        labels (torch.Tensor): true next tokens, ``[n]``.
        columns (Columns | None): what to read beside the labels.

    Returns:
        Readout: both, in float32.
    """
    label_logits = logits.gather(1, labels[:, None])[:, 0]
    if columns is None:
        return Readout(label_logits - logits.logsumexp(-1), None)
    values = read_columns(logits, columns)
    # With the tail, the columns partition the vocabulary: their log-sum-exp is that of all logits, at no further cost.
    normalizer = (values if columns.tail else logits).logsumexp(-1)
    return Readout(label_logits - normalizer, values)


def reduce_in_chunks(
    hidden: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    loss: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums a per-position loss over rows of hidden states, holding the logits of one chunk at a time.

    The gradient with respect to ``hidden`` (and ``parameters``) is taken inside the forward, chunk by chunk, so that
    neither logits nor their gradient outlive a chunk and nothing is computed twice.

    Args:
        hidden (torch.Tensor): ``[T, H]``.
        parameters (Sequence[torch.Tensor]): trainable tensors that ``loss`` uses (LoRA on the head); empty while the
            head is frozen.
        loss (Callable): maps (rows ``[n, H]``, their slice of T) to (scalar loss, metrics ``[M]``).
        chunk (int): rows at a time.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: the sum of the losses (scalar, differentiable) and of the metrics (``[M]``).
    """
    return _GradientInForward.apply(loss, chunk, hidden, *parameters)


class _GradientInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, chunk, hidden, *parameters):
        total, metrics = 0.0, 0.0
        wanted = [tensor for tensor in (hidden, *parameters) if tensor.requires_grad]
        gradients = [torch.zeros_like(tensor) for tensor in parameters if tensor.requires_grad]
        hidden_gradient = torch.empty_like(hidden)
        # An empty batch (T = 0) still makes one pass over no rows, so that metrics have their shape.
        for start in range(0, max(len(hidden), 1), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            with torch.enable_grad():
                part = hidden[rows].detach().requires_grad_()
                value, counts = loss(part, rows)
                if wanted:
                    first, *rest = torch.autograd.grad(value, [part, *(p for p in parameters if p.requires_grad)])
                    hidden_gradient[rows] = first
                    for gradient, addition in zip(gradients, rest, strict=True):
                        gradient += addition
            total, metrics = total + value.detach(), metrics + counts.detach()
        ctx.save_for_backward(hidden_gradient, *gradients)
        ctx.trainable = [tensor.requires_grad for tensor in parameters]
        ctx.mark_non_differentiable(metrics)
        return total, metrics

    @staticmethod
    def backward(ctx, grad_total, _):
        hidden_gradient, *gradients = ctx.saved_tensors
        remaining = iter(gradients)
        scaled = [next(remaining) * grad_total if trainable else None for trainable in ctx.trainable]
        return None, None, hidden_gradient * grad_total, *scaled
