"""A network as the core sees it: conversations go in, the few numbers that a loss needs come out."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from pact_tune.batching import Batch, collate, shared_prefix
from pact_tune.conversations import Conversation
from pact_tune.head import reduce_in_chunks
from pact_tune.objectives.base import Chunk, Objective, View
from pact_tune.reference.readings import Head, Reading


class TrainableHead(Head, Protocol):
    """A head that may itself be trained."""

    def trained(self) -> Sequence[torch.Tensor]:
        """What is trained in the head: an adapter, the head itself in full fine-tuning, or nothing."""


class Decoder:
    """What every backbone shares; a subclass knows how to run its network up to the head.

    Args:
        pad_id (int): id to pad batches with.
        device (torch.device): where batches go.

    Attributes:
        model (nn.Module): the network.
        longest_shared (int): up to how many tokens each token of a row attends to all before it, in a way that can be
            computed behind a shared prefix; longer rows never are. 0: none.
    """

    model: nn.Module
    longest_shared: int = 0

    def __init__(self, pad_id: int, device: torch.device) -> None:
        self.pad_id = pad_id
        self.device = device

    def run(self, batch: Batch, read: Callable[[torch.Tensor, TrainableHead], Any]) -> Any:
        """Runs the trunk on a batch's tokens and returns ``read(hidden, head)``, called inside the root forward.

        There, under FSDP2, the head's weights are whole. ``hidden`` holds the normalised response positions, ``[T, H]``.
        """
        raise NotImplementedError

    def frozen(self) -> contextlib.AbstractContextManager:
        """Makes the network the reference while it is open: adapters off, nothing stochastic."""
        raise NotImplementedError

    def loss(
        self, batch: Batch, objective: Objective, reference: Mapping[View, torch.Tensor], scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The training loss of one batch, differentiable.

        Args:
            batch (Batch): on the model's device.
            objective (Objective): what to minimise.
            reference (Mapping[View, torch.Tensor]): the objective's reading at the batch's T positions, as stored.
            scale (float): factor of the loss summed over positions.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: scaled loss (scalar) and terms summed over positions ``[M]``.
        """

        def read(hidden: torch.Tensor, head: TrainableHead) -> tuple[torch.Tensor, torch.Tensor]:
            def chunk_loss(rows: torch.Tensor, where: slice) -> tuple[torch.Tensor, torch.Tensor]:
                labels = batch.labels[where]
                label_logprobs, student = objective.reading.of_student(rows, head, labels)
                of_reference = {view: objective.reading.expand(t[where], head) for view, t in reference.items()}
                place = (batch.position[where], batch.row[where], batch.ce_weight[where], batch.weight[where])
                value, terms = objective.loss(Chunk(label_logprobs, student, of_reference, *place))
                return value * scale, terms

            return reduce_in_chunks(hidden, head.trained(), chunk_loss)

        return self.run(batch, read)

    def read_reference(self, conversations: Sequence[Conversation], reading: Reading) -> torch.Tensor:
        """A reading of the frozen aligned model, as it is stored.

        Args:
            conversations (Sequence[Conversation]): one batch; may be empty: under FSDP all ranks run equally many.
            reading (Reading): what to read.

        Returns:
            torch.Tensor: ``[T, W]``.
        """
        prefix = shared_prefix(conversations, self.longest_shared)
        batch = collate(conversations, self.pad_id, prefix=prefix).to(self.device)
        with torch.no_grad(), self.frozen():
            return self.run(batch, lambda hidden, head: reading.of_reference(hidden, head, batch.labels))
