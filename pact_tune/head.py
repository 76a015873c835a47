"""From hidden states at response positions to the few numbers that losses need, without holding all logits.

Shapes: T = response tokens of the batch, n = those of a chunk, H = hidden size, V = vocabulary, K = safety tokens (S).
"""

from collections.abc import Callable, Sequence

import torch

# Rows whose logits exist at a time: 256 x 152k fp32 are 156 MB, and the head's weights are streamed T / 256 times.
CHUNK = 256


def read_columns(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits on S and the log-sum-exp of all others, without a gradient.

    Args:
        logits (torch.Tensor): ``[n, V]`` float32; overwritten.
        ids (torch.Tensor): S, ``[K]``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: ``[n, K]`` and the tail ``[n, 1]``.
    """
    safety = logits.index_select(1, ids)
    tail, _ = _exponentiate_(logits.index_fill_(1, ids, -torch.inf))
    return safety, tail


def read_logits(
    logits: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Label log-probabilities, logits on S and the tail of full logits, differentiable.

    Args:
        logits (torch.Tensor): ``[n, V]`` float32; overwritten, and once more in the backward.
        labels (torch.Tensor): true next tokens, ``[n]``.
        ids (torch.Tensor | None): S, ``[K]``; None: no tokens.

    Returns:
        tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]: ``[n]`` in nats, and (``[n, K]``, ``[n, 1]``); float32.
    """
    ids = labels.new_empty(0) if ids is None else ids
    label_logprobs, safety, tail = _ReadInPlace.apply(logits, labels, ids)
    return label_logprobs, (safety, tail)


class _ReadInPlace(torch.autograd.Function):
    """Label log-probabilities, logits on S and the tail of logits, whose own memory becomes their gradient's.

    The logits of a chunk are by far the largest tensor of a step, and reading and writing them is most of the head's
    time beside its two matrix products. So they are exponentiated once and in place, with S masked out: the sum of
    that is the tail's, and S and tail together partition the vocabulary, which gives the normaliser as well.
    """

    @staticmethod
    def forward(ctx, logits, labels, ids):
        label_logits = logits.gather(1, labels[:, None])
        safety = logits.index_select(1, ids)
        tail, total = _exponentiate_(logits.index_fill_(1, ids, -torch.inf))
        normalizer = torch.cat([safety, tail], dim=1).logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, labels, ids, safety, tail, total, normalizer)
        return (label_logits - normalizer)[:, 0], safety, tail

    @staticmethod
    def backward(ctx, grad_label, grad_safety, grad_tail):
        exponentials, labels, ids, safety, tail, total, normalizer = ctx.saved_tensors
        grad_label = grad_label[:, None]
        # d label_logprob / dz = onehot - softmax(z), on S and outside it; d tail / dz = softmax over the complement
        outside = grad_tail - grad_label * (tail - normalizer).exp()
        gradient = exponentials.mul_(outside / total)
        gradient.index_copy_(1, ids, grad_safety - grad_label * (safety - normalizer).exp())
        return gradient.scatter_add_(1, labels[:, None], grad_label), None, None


def _exponentiate_(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Overwrites rows ``[n, V]`` with e = exp(z - max); returns their log-sum-exp and the sum of e, both ``[n, 1]``."""
    tiny = torch.finfo(logits.dtype)
    # Where nothing is left outside S (k: vocabulary) all is -inf: the sum is then 0, its logarithm -inf.
    maximum = logits.amax(-1, keepdim=True).clamp(min=tiny.min)
    total = logits.sub_(maximum).exp_().sum(-1, keepdim=True)
    return maximum + total.log(), total.clamp(min=tiny.tiny)


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
