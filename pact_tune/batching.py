"""Conversations to batches: the tensors of one forward."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from pact_tune.conversations import Conversation
from pact_tune.prefixes import SharedPrefix, group_by_prefix, shared_length

T = TypeVar("T")
LEAST_FILLED = 0.9  # of a row of a forward without training; the rest is padding


@dataclass(frozen=True)
class Batch:
    """One forward's input. B conversations, padded on the right to S tokens, or packed, B = 1; T response tokens in all.

    Packed, each is whole, or all stand behind a prefix that they share.

    Attributes:
        tokens (torch.Tensor): ``[B, S]`` int64.
        index (torch.Tensor): rows of the flattened hidden states ``[B * S, H]`` that predict a response token, ``[T]``.
        labels (torch.Tensor): those response tokens, ``[T]``.
        position (torch.Tensor): t of each, counted from 0 at the start of its response, ``[T]``.
        row (torch.Tensor): its conversation's number in the batch, ``[T]``.
        ce_weight (torch.Tensor): weight of its cross-entropy, ``[T]`` float32; 0: not trained.
        weight (torch.Tensor): weight of its constraint, ``[T]`` float32; 0: not constrained.
        mask (torch.Tensor | None): True where a token attends to another, ``[1, S, S]``; None: to all before it.
        input_pos (torch.Tensor | None): position of each token in its conversation, ``[1, S]``; None: in its row.
        shared (SharedPrefix | None): how conversations stand behind what they share; without training only.
    """

    tokens: torch.Tensor
    index: torch.Tensor
    labels: torch.Tensor
    position: torch.Tensor
    row: torch.Tensor
    ce_weight: torch.Tensor
    weight: torch.Tensor
    mask: torch.Tensor | None = None
    input_pos: torch.Tensor | None = None
    shared: SharedPrefix | None = field(default=None, kw_only=True)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        moved: dict[str, Any] = {n: to_device(t, device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return replace(self, **moved, shared=self.shared and self.shared.to(device))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the CPU without waiting for the device, which copies from pageable memory would do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def collate(conversations: Sequence[Conversation], pad_id: int, packed: bool = False, prefix: int = 0) -> Batch:
    """Pads conversations to a batch, or packs them end to end.

    Padding stands on the right, where causal attention never looks back from, so that no mask is needed.

    Args:
        conversations (Sequence[Conversation]): may be empty: a rank without rows still takes part in the forward.
        pad_id (int): id to pad with.
        packed (bool): one row without padding, with a mask that keeps each conversation to itself.
        prefix (int): where it is not 0, one row without padding, in which what all conversations begin with, so many
            tokens, stands once.

    Returns:
        Batch: on the CPU. The last token of each conversation is only ever a label.
    """
    inputs = [c.tokens[:-1] or c.tokens for c in conversations] or [[pad_id]]
    lengths = list(map(len, inputs))
    mask = input_pos = shared = None
    if prefix:
        tokens = torch.tensor([sum((row[prefix:] for row in inputs), inputs[0][:prefix])])
        starts = [0, *itertools.accumulate(length - prefix for length in lengths)]
        input_pos = torch.cat([torch.arange(prefix), *(torch.arange(prefix, length) for length in lengths)])[None]
        shared = SharedPrefix.of(prefix, [length - prefix for length in lengths])
    elif packed:
        tokens = torch.tensor([sum(inputs, [])])
        starts = [0, *itertools.accumulate(lengths)]
        document = torch.arange(len(inputs)).repeat_interleave(torch.tensor(lengths))
        mask = (document[:, None] == document).tril()[None]
        input_pos = torch.cat([torch.arange(length) for length in lengths])[None]
    else:
        width = max(lengths)
        tokens = torch.tensor([row + [pad_id] * (width - len(row)) for row in inputs])
        starts = [row * width for row in range(len(inputs))]
    spans = [(row, *span) for row, c in enumerate(conversations) for span in c.responses]
    index = [starts[row] + j - 1 for row, start, end in spans for j in range(start, end)]
    labels = [token for row, start, end in spans for token in conversations[row].tokens[start:end]]
    position = [t for _, start, end in spans for t in range(end - start)]
    rows = torch.tensor([row for row, start, end in spans for _ in range(start, end)], dtype=torch.int64)
    ce_weight = torch.tensor([c.ce_weight for c in conversations], dtype=torch.float32)[rows]
    weight = torch.tensor([c.weight for c in conversations], dtype=torch.float32)[rows]
    flat = [torch.tensor(values, dtype=torch.int64) for values in (index, labels, position)]
    return Batch(tokens, flat[0], flat[1], flat[2], rows, ce_weight, weight, mask, input_pos, shared=shared)


def shareable(conversation: Conversation) -> list[int]:
    """What of a conversation other rows may share: all before the token that predicts its first response."""
    return conversation.tokens[: conversation.responses[0][0] - 1]


def shared_prefix(conversations: Sequence[Conversation], longest: int) -> int:
    """How many tokens of a batch are computed once for all its rows.

    Args:
        conversations (Sequence[Conversation]): may be empty.
        longest (int): row, in tokens, that the network can compute so; see :class:`pact_tune.decoder.Decoder`.

    Returns:
        int: for :func:`collate`.
    """
    lengths = [len(c.tokens) for c in conversations]
    return 0 if max(lengths, default=0) > longest else shared_length(list(map(shareable, conversations)), sum(lengths))


def response_only_views(
    conversation: Conversation, prefix: Sequence[int], max_tokens: int | None
) -> list[Conversation]:
    """The response-only view of each response (paper, section 3.2): assistant header + response, no prompt.

    A view is a conversation of its own, so that the reference, and its cache, treat both views alike; equal responses
    have equal views.

    Args:
        conversation (Conversation): the whole chat.
        prefix (Sequence[int]): ids of (BOS +) assistant header.
        max_tokens (int | None): response tokens to keep; beyond it the gate of Eq. 8 is negligible.

    Returns:
        list[Conversation]: one a response.
    """
    prefix = list(prefix)
    responses = [conversation.tokens[start:end][:max_tokens] for start, end in conversation.responses]
    return [Conversation(prefix + tokens, [(len(prefix), len(prefix) + len(tokens))]) for tokens in responses]


def batches_by_length(lengths: Sequence[int], max_tokens: int, least_filled: float = LEAST_FILLED) -> list[list[int]]:
    """Cuts rows into batches for forwards without training, in which the order of rows does not matter.

    Args:
        lengths (Sequence[int]): tokens of each row.
        max_tokens (int): of a batch, padding included; a longer row is a batch of its own.
        least_filled (float): share of its batch's width that every row has.

    Returns:
        list[list[int]]: row numbers, the longest first; depends on the arguments alone.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        width = lengths[batches[-1][0]] if batches else 0
        if not batches or width * (len(batches[-1]) + 1) > max_tokens or lengths[row] < least_filled * width:
            batches.append([])
        batches[-1].append(row)
    return batches


def batches_by_prefix(conversations: Sequence[Conversation], max_tokens: int) -> list[list[int]]:
    """Cuts rows into batches for forwards without training, of rows that begin alike and are of like lengths.

    A batch is small enough for a network that does not compute what its rows share once.

    Args:
        conversations (Sequence[Conversation]): the rows.
        max_tokens (int): of a batch, padding included; a longer row is a batch of its own.

    Returns:
        list[list[int]]: row numbers; depends on the arguments alone.
    """
    lengths = [len(c.tokens) for c in conversations]
    groups = group_by_prefix(list(map(shareable, conversations)))
    return [[g[i] for i in batch] for g in groups for batch in batches_by_length([lengths[i] for i in g], max_tokens)]


def rank_rows(rows: Sequence[T], rank: int, world_size: int) -> list[T]:
    """The rows of a global batch that one rank computes: every ``world_size``-th, so that lengths spread evenly."""
    return list(rows[rank::world_size])
