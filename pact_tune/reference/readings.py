"""What is taken from a model at a response position, of student and reference alike, and how it is stored.

Shapes: n positions, H hidden size, V vocabulary, K safety tokens, W numbers that a reading stores a position.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pact_tune.head import CHUNK, read_columns, read_logits


class Head(Protocol):
    """The output head of a network, with whatever it does to logits (a soft-cap, a scale); used inside its forward."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[n, V]`` float32 of hidden rows ``[n, H]``, with the head's adapter as it is switched."""

    def frozen_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same of the head as it was before training, without a gradient."""

    def columns(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the tokens ``ids`` alone, ``[n, len(ids)]`` float32, of the head without its adapter."""


class Reading(Protocol):
    """A kind of number that a constraint looks at.

    Attributes:
        name (str): for people and manifests.
        centred (bool): stored in the cache's dtype, less each position's maximum, which is stored in float32; False:
            stored as computed.
        frozen_head (bool): :meth:`expand` needs the head as it was before training.
    """

    name: str
    centred: bool
    frozen_head: bool

    def describe(self) -> dict[str, Any]:
        """What the stored numbers depend on beside the network, for a cache's manifest; JSON-serialisable."""

    def width(self, hidden_size: int) -> int:
        """W, numbers stored a position."""

    def of_student(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Differentiable: log-probabilities of the labels ``[n]`` float32, and what :meth:`expand` gives for the reference.

        Args:
            hidden (torch.Tensor): normalised hidden states at one chunk's positions, ``[n, H]``.
            head (Head): of the network.
            labels (torch.Tensor): true next tokens, ``[n]``.
        """

    def of_reference(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
        """What is stored of the reference, ``[n, W]``; called without gradients, adapters off, at any number of rows."""

    def expand(self, stored: torch.Tensor, head: Head) -> torch.Tensor:
        """What is used of it, from one chunk's stored rows ``[n, W]``."""


def _nothing_to_expand(stored: torch.Tensor, head: Head) -> torch.Tensor:
    return stored


@dataclass(frozen=True)
class Nothing:
    """The label's log-probability of the student alone: plain fine-tuning has no reference."""

    name = "nothing"
    centred = True
    frozen_head = False

    def describe(self) -> dict[str, Any]:
        return {"reading": self.name}

    def width(self, hidden_size: int) -> int:
        return 0

    def of_student(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        label_logprobs, _ = read_logits(head.logits(hidden), labels, None)
        return label_logprobs, label_logprobs.new_empty(len(hidden), 0)

    def of_reference(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
        return hidden.new_empty(len(hidden), 0, dtype=torch.float32)

    expand = staticmethod(_nothing_to_expand)


@dataclass(frozen=True)
class Columns:
    """Logits of the safety tokens and, where asked for, the tail: W = K or K + 1.

    Attributes:
        ids (torch.Tensor): safety token ids, ``[K]`` int64, on the model's device.
        tail (bool): append the log-sum-exp of the logits of all other tokens.
    """

    ids: torch.Tensor
    tail: bool

    name = "safety columns"
    centred = True
    frozen_head = False

    def describe(self) -> dict[str, Any]:
        return {"reading": self.name, "safety_tokens": self.ids.tolist(), "tail": self.tail}

    def width(self, hidden_size: int = 0) -> int:
        return self.ids.numel() + self.tail

    def of_student(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        label_logprobs, (safety, tail) = read_logits(head.logits(hidden), labels, self.ids)
        return label_logprobs, torch.cat([safety, tail], dim=1) if self.tail else safety

    def of_reference(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
        if not self.tail:
            return head.columns(hidden, self.ids)
        parts = [torch.cat(read_columns(head.logits(part), self.ids), dim=1) for part in hidden.split(CHUNK)]
        return torch.cat(parts) if parts else hidden.new_empty(0, self.width(), dtype=torch.float32)

    expand = staticmethod(_nothing_to_expand)


@dataclass(frozen=True)
class LabelLogprob:
    """Log-probability of the true next token, nats: W = 1."""

    name = "label log-probability"
    centred = True  # the maximum of one number is the number itself: stored exactly
    frozen_head = False

    def describe(self) -> dict[str, Any]:
        return {"reading": self.name}

    def width(self, hidden_size: int) -> int:
        return 1

    def of_student(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        label_logprobs, _ = read_logits(head.logits(hidden), labels, None)
        return label_logprobs, label_logprobs[:, None]

    def of_reference(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
        parts = [
            read_logits(head.logits(part), label, None)[0][:, None]
            for part, label in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        ]
        return torch.cat(parts) if parts else hidden.new_empty(0, 1, dtype=torch.float32)

    expand = staticmethod(_nothing_to_expand)


@dataclass(frozen=True)
class Hidden:
    """The hidden state before the head, after the last norm: W = H, stored in the network's own dtype."""

    name = "hidden state"
    centred = False
    frozen_head = False

    def describe(self) -> dict[str, Any]:
        return {"reading": Hidden.name}

    def width(self, hidden_size: int) -> int:
        return hidden_size

    def of_student(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        label_logprobs, _ = read_logits(head.logits(hidden), labels, None)
        return label_logprobs, hidden

    def of_reference(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> torch.Tensor:
        return hidden

    expand = staticmethod(_nothing_to_expand)


@dataclass(frozen=True)
class Vocabulary(Hidden):
    """Logits of the whole vocabulary: too many to store, so the hidden state is, and the frozen head makes them anew."""

    name = "vocabulary"
    frozen_head = True

    def of_student(self, hidden: torch.Tensor, head: Head, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head.logits(hidden)
        everything = torch.arange(logits.shape[1], device=logits.device)
        label_logprobs, (logits, _) = read_logits(logits, labels, everything)
        return label_logprobs, logits

    def expand(self, stored: torch.Tensor, head: Head) -> torch.Tensor:
        return head.frozen_logits(stored)
