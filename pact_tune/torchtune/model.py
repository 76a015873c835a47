"""A torchtune decoder as the core sees it: hidden states go in, the few numbers that a loss needs come out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import disable_adapter

from pact_tune.batching import Batch, collate
from pact_tune.conversations import Conversation
from pact_tune.head import CHUNK, Columns, read_columns, read_logits, reduce_in_chunks
from pact_tune.objectives import SFT, Reference
from pact_tune.torchtune.gemma2 import Gemma2Decoder, soft_cap


class Decoder:
    """Gives a torchtune decoder our last step in the place of its own.

    The step runs inside the root module's forward: there, under FSDP2, the output head's weight is whole. Nothing after
    the last layer's attention looks at another position, so from there on only response positions are computed.

    Args:
        model (TransformerDecoder): with LoRA; sharded or not.
        pad_id (int): id to pad batches with.
        device (torch.device): where batches go.
    """

    def __init__(self, model: TransformerDecoder, pad_id: int, device: torch.device) -> None:
        self.model = model
        self.pad_id = pad_id
        self.device = device
        self._stochastic = {
            m: m.attn_dropout for m in model.modules() if isinstance(m, MultiHeadAttention) and m.attn_dropout
        }
        *_, last = (m for m in model.modules() if isinstance(m, TransformerSelfAttentionLayer))
        last.forward = partial(self._last_layer, last)
        model.unembed = self._unembed

    def _last_layer(
        self, layer: TransformerSelfAttentionLayer, x: torch.Tensor, *, mask: Any, input_pos: Any, **_: Any
    ) -> torch.Tensor:
        """The layer's own forward, but for the rows that it drops after its attention: ``[B, S, H]`` to ``[1, T, H]``."""
        normed = layer.sa_norm(x)
        x = x + layer.sa_scale(layer.attn(normed, normed, mask=mask, input_pos=input_pos))
        x = x.flatten(0, 1).index_select(0, self._index)[None]
        return x + layer.mlp_scale(layer.mlp(layer.mlp_norm(x)))

    def _unembed(self, hidden: torch.Tensor) -> Any:
        return self._read(self.model.norm(hidden)[0])

    def _forward(self, batch: Batch, read: Callable[[torch.Tensor], Any]) -> Any:
        """Runs the trunk on a batch's tokens; returns ``read`` of the normalised response positions ``[T, H]``."""
        self._index, self._read = batch.index, read
        return self.model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos)

    def loss(
        self, batch: Batch, objective: SFT, reference: Reference, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The training loss of one batch, differentiable.

        Args:
            batch (Batch): on the model's device.
            objective (SFT): what to minimise.
            reference (Reference): its columns at the batch's T positions.
            scale (float): factor of the loss summed over positions.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: scaled loss (scalar) and metrics summed over positions ``[M]``.
        """

        def chunk_loss(rows: torch.Tensor, where: slice) -> tuple[torch.Tensor, torch.Tensor]:
            student = read_logits(self._logits(rows), batch.labels[where], objective.columns)
            value, metrics = objective(student, reference[where], batch.position[where])
            return value * scale, metrics

        def read(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return reduce_in_chunks(rows, self._head_parameters(), chunk_loss)

        return self._forward(batch, read)

    def reference_columns(self, conversations: Sequence[Conversation], columns: Columns) -> torch.Tensor:
        """The frozen aligned model's columns: the same network with its adapters disabled.

        Args:
            conversations (Sequence[Conversation]): one batch; may be empty.
            columns (Columns): what to read.

        Returns:
            torch.Tensor: ``[T, C]`` float32.
        """
        batch = collate(conversations, self.pad_id).to(self.device)

        def read(rows: torch.Tensor) -> torch.Tensor:
            if not columns.tail:
                return self._capped(F.linear(rows, self._head_weight()[columns.ids]).float())
            parts = [read_columns(self._logits(part), columns) for part in rows.split(CHUNK)]
            return torch.cat(parts) if parts else rows.new_empty(0, columns.width, dtype=torch.float32)

        with torch.no_grad(), disable_adapter(self.model), self._deterministic():
            return self._forward(batch, read)

    @contextmanager
    def _deterministic(self) -> Iterator[None]:
        """Without the dropout of attention: a reference is the same each time it is read."""
        for attention in self._stochastic:
            attention.attn_dropout = 0.0
        try:
            yield
        finally:
            for attention, dropout in self._stochastic.items():
                attention.attn_dropout = dropout

    def _logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Full logits of hidden rows ``[n, H]``: ``[n, V]`` float32."""
        return self._capped(self.model.output(rows).float())

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        return soft_cap(logits, self.model.logit_softcap) if isinstance(self.model, Gemma2Decoder) else logits

    def _head_weight(self) -> torch.Tensor:
        """The output head's own weight ``[V, H]``, without LoRA; to be read inside the forward only."""
        output = self.model.output
        return output.tied_module.weight if isinstance(output, TiedLinear) else output.weight

    def _head_parameters(self) -> list[nn.Parameter]:
        """What is trained in the head: an adapter, the head itself in full fine-tuning, or nothing."""
        output = self.model.output
        parameters = [output.tied_module.weight] if isinstance(output, TiedLinear) else output.parameters()
        return [parameter for parameter in parameters if parameter.requires_grad]
