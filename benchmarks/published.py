"""PACT's training step as its authors published it, written plainly from its description.

A second, frozen copy of the network; every row padded to 512 tokens; logits of the whole vocabulary in float32, three
times (student, reference with the whole conversation, reference with the response alone), of which the columns of the
safety tokens are picked afterwards. It shares no code with the package: tests compare the two, benchmarks race them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

PAD_TO = 512
TEMPERATURE, SLOPE, COVERED, DECAY_START, TAU = 2.0, 2.0, 0.9, 8, 8.0
IGNORED = -100


def published_loss(
    model: nn.Module,
    reference: nn.Module,
    conversations: Sequence,
    header: Sequence[int],
    ids: torch.Tensor,
    weights: torch.Tensor,
    lambda_kl: float,
    pad_id: int,
    pad_to: int = PAD_TO,
) -> torch.Tensor:
    """Cross-entropy + lambda_kl * KL, both means over the response tokens of a batch.

    Args:
        model (nn.Module): the network in training; maps tokens ``[B, S]`` to float32 logits ``[B, S, V]``.
        reference (nn.Module): a second copy of it, frozen.
        conversations (Sequence): B of them, with ``tokens`` and one range in ``responses``.
        header (Sequence[int]): token ids of the assistant header.
        ids (torch.Tensor): safety token ids, ``[K]``.
        weights (torch.Tensor): their weights, at least 0, ``[K]``.
        lambda_kl (float): weight of the KL.
        pad_id (int): id to pad with.
        pad_to (int): tokens that every row is padded to.

    Returns:
        torch.Tensor: the loss, scalar.
    """
    device = ids.device
    spans = [c.responses[0] for c in conversations]
    tokens = _padded([c.tokens for c in conversations], pad_id, pad_to).to(device)
    labels = [[IGNORED] * start + c.tokens[start:end] for c, (start, end) in zip(conversations, spans, strict=True)]
    labels = _padded(labels, IGNORED, pad_to).to(device)
    responses = [c.tokens[start:end] for c, (start, end) in zip(conversations, spans, strict=True)]
    alone = [list(header) + response[:-1] for response in responses]
    alone = _padded(alone, pad_id, max(map(len, alone))).to(device)

    logits = model(tokens)
    ce = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=IGNORED)
    with torch.no_grad():
        post = reference(alone)
        full = reference(tokens)

    longest = max(map(len, responses))
    student = _answers(logits, [start - 1 for start, _ in spans], longest)[..., ids]
    full = _answers(full, [start - 1 for start, _ in spans], longest)[..., ids]
    post = _answers(post, [len(header) - 1] * len(spans), longest)[..., ids]
    position = torch.arange(longest, device=device).expand(len(spans), -1)
    mask = position < torch.tensor(list(map(len, responses)), device=device)[:, None]

    with torch.no_grad():
        gate = torch.sigmoid(SLOPE * (_dispersion(student) - _dispersion(post)))
        gate = gate * torch.exp(-(position - DECAY_START).clamp(min=0) / TAU)
        mixed = (1 - gate[..., None]) * full + gate[..., None] * post
        target = torch.softmax(mixed / TEMPERATURE, dim=-1) * weights
        target = target / target.sum(-1, keepdim=True)
    logp = torch.log_softmax(student / TEMPERATURE, dim=-1)
    kl = (torch.xlogy(target, target) - target * logp).sum(-1) * TEMPERATURE**2
    return ce + lambda_kl * (kl * mask).sum() / mask.sum()


def _padded(rows: list[list[int]], value: int, width: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def _answers(logits: torch.Tensor, starts: list[int], longest: int) -> torch.Tensor:
    """The rows that predict response tokens, with the whole vocabulary: ``[B, longest, V]`` float32."""
    width = logits.shape[1]
    parts = [
        row[[min(start + t, width - 1) for t in range(longest)]] for row, start in zip(logits, starts, strict=True)
    ]
    return torch.stack(parts).float()


def _dispersion(logits: torch.Tensor) -> torch.Tensor:
    """Share of the safety tokens that covers most of their mass, ``[B, longest]``."""
    mass = logits.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    needed = ((mass < COVERED).sum(-1) + 1).clamp(max=logits.shape[-1])
    return needed / logits.shape[-1]
