"""Rows that begin alike: which to compute together, and how attention runs when what they share is computed once.

A forward without training needs no more than the hidden states at response positions, and these depend on the tokens before
them alone. So rows that share a prefix (system message, instruction) are packed behind it, once:

    prefix | rest of row 0 | rest of row 1 | ...          tokens [1, N], each at its position in its own row

Everything in a decoder but attention looks at one token at a time. Attention is computed in two parts: of the prefix on
itself, and of each row's rest on the prefix and itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

FORWARD_TOKENS = 256  # what one forward more costs, in tokens: the weights have to be read once again
LEAST_SAVED = 0.05  # share of a batch's tokens below which its rows are computed one beside the other

# Query, key and value ``[B, heads, S, head_dim]`` and a mask ``[R, S]`` of what is attended to (None: causal) to the first's shape.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class SharedPrefix:
    """How rows stand behind their prefix. B rows of at most R tokens behind P shared ones; N tokens in all.

    Attributes:
        length (int): P.
        place (torch.Tensor): of each row's tokens among the N - P behind the prefix, ``[B, R]``; 0 where a row is shorter.
        back (torch.Tensor): of each of the N - P in the flattened ``[B * R]``.
        mask (torch.Tensor): True where a token of a row attends to one of prefix and row, ``[R, P + R]``.
    """

    length: int
    place: torch.Tensor
    back: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, length: int, rests: Sequence[int]) -> "SharedPrefix":
        """The layout of rows with ``rests`` tokens behind a prefix of ``length``, on the CPU."""
        longest = max(rests)
        column = torch.arange(longest)
        filled = column < torch.tensor(rests)[:, None]
        place = torch.zeros(len(rests), longest, dtype=torch.int64)
        place[filled] = torch.arange(sum(rests))
        mask = torch.ones(longest, length + longest, dtype=torch.bool).tril(length)
        return cls(length, place, filled.flatten().nonzero()[:, 0], mask)

    def to(self, device: torch.device) -> "SharedPrefix":
        """The same on ``device``."""
        tensors = (t.to(device, non_blocking=True) for t in (self.place, self.back, self.mask))
        return SharedPrefix(self.length, *tensors)

    def attention(self, attend: Attend, *states: torch.Tensor) -> torch.Tensor:
        """What each token attends to, itself and those before it in its own row.

        Args:
            attend (Attend): the network's own attention.
            *states (torch.Tensor): query, key and value, ``[1, heads, N, head_dim]``.

        Returns:
            torch.Tensor: ``[1, heads, N, head_dim]``.
        """
        query, key, value = (state[:, :, : self.length] for state in states)
        of_prefix = attend(query, key, value, None)
        query, *others = (self._rows(state) for state in states)
        shared = (state.expand(len(query), -1, -1, -1) for state in (key, value))
        key, value = (torch.cat(pair, dim=2) for pair in zip(shared, others, strict=True))
        of_rows = attend(query, key, value, self.mask).transpose(0, 1).flatten(1, 2)
        return torch.cat([of_prefix, of_rows.index_select(1, self.back)[None]], dim=2)

    def _rows(self, state: torch.Tensor) -> torch.Tensor:
        """What stands behind the prefix of ``[1, heads, N, head_dim]``, row by row: ``[B, heads, R, head_dim]``."""
        behind = state[0, :, self.length :].index_select(1, self.place.flatten())
        return behind.unflatten(1, self.place.shape).transpose(0, 1)


def shared_length(prompts: Sequence[list[int]], tokens: int) -> int:
    """How many tokens all rows begin with, if computing these once is worth it.

    Args:
        prompts (Sequence[list[int]]): what may be shared of each row, token ids.
        tokens (int): of all rows.

    Returns:
        int: P; 0 where too little would be saved.
    """
    if len(prompts) < 2:
        return 0
    length = common_length(min(prompts), max(prompts))
    return length if length * (len(prompts) - 1) >= LEAST_SAVED * tokens else 0


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass
class _Node:
    """All rows that begin with the same ``depth`` tokens: groups that were made of some, and the rows that are left."""

    depth: int
    loose: list[int] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    saved: int = 0

    def settle_into(self, parent: "_Node") -> None:
        """Makes a group of the rows that are left, or leaves them to the parent, or the whole node, whatever saves most."""
        rows = [*self.loose, *(row for group in self.groups for row in group)]
        own = self.saved + self.depth * (len(self.loose) - 1) - FORWARD_TOKENS
        kept = self.saved + parent.depth * len(self.loose)
        if parent.depth * len(rows) >= max(own, kept):
            parent.loose += rows
            return
        parent.groups += self.groups
        if own > kept:
            parent.groups.append(self.loose)
        else:
            parent.loose += self.loose
        parent.saved += self.saved if own <= kept else own


def group_by_prefix(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Groups rows so that little is left to compute when each group's common prefix is computed once.

    Sorted, rows that begin alike are neighbours, and prefixes form a tree. From the leaves up, each node makes a group of
    its rows where that saves more than leaving them to its parent; a group costs a forward.

    Args:
        prompts (Sequence[list[int]]): what may be shared of each row, token ids.

    Returns:
        list[list[int]]: row numbers, each once, those that share nothing in the last group; depends on ``prompts`` alone.
    """
    path = [_Node(0)]
    previous: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda row: prompts[row]):
        _close(path, common_length(previous, prompts[row]))
        path.append(_Node(len(prompts[row]) + 1, [row]))
        previous = prompts[row]
    _close(path, 0)
    (root,) = path
    return [group for group in (*root.groups, root.loose) if group]


def _close(path: list[_Node], depth: int) -> None:
    """Settles all nodes of a path that are deeper than ``depth``, and leaves one of that depth at its end."""
    while path[-1].depth > depth:
        node = path.pop()
        if path[-1].depth < depth:
            path.append(_Node(depth))
        node.settle_into(path[-1])
