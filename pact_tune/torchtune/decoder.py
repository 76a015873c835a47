"""A torchtune decoder as the core sees it."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import disable_adapter

from pact_tune.batching import Batch
from pact_tune.decoder import Decoder, TrainableHead
from pact_tune.prefixes import SharedPrefix
from pact_tune.torchtune.gemma2 import Gemma2Decoder, soft_cap


class TorchtuneHead:
    """The output head of a torchtune decoder; to be used inside its forward only.

    Args:
        model (TransformerDecoder): whose head it is.
    """

    def __init__(self, model: TransformerDecoder) -> None:
        self.model = model

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._capped(self.model.output(hidden).float())

    @torch.no_grad()
    def frozen_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._capped(F.linear(hidden, self._weight()).float())

    def columns(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self._capped(F.linear(hidden, self._weight()[ids]).float())

    def trained(self) -> list[nn.Parameter]:
        output = self.model.output
        parameters = [output.tied_module.weight] if isinstance(output, TiedLinear) else output.parameters()
        return [parameter for parameter in parameters if parameter.requires_grad]

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        return soft_cap(logits, self.model.logit_softcap) if isinstance(self.model, Gemma2Decoder) else logits

    def _weight(self) -> torch.Tensor:
        """The head's own weight ``[V, H]``, without LoRA."""
        output = self.model.output
        return output.tied_module.weight if isinstance(output, TiedLinear) else output.weight


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What torchtune's attention computes without dropout, from as many key heads as query heads."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)


def _attention(own: Callable[..., torch.Tensor], *states: torch.Tensor, mask: Any, **options: Any) -> torch.Tensor:
    """A layer's own attention, but for rows behind a shared prefix, whose layout comes in the mask's place."""
    if isinstance(mask, SharedPrefix):
        return mask.attention(attend, *states)
    return own(*states, mask=mask, **options)


class TorchtuneDecoder(Decoder):
    """Gives a torchtune decoder our last step in the place of its own.

    The step runs inside the root module's forward: there, under FSDP2, the output head's weight is whole. Nothing after
    the last layer's attention looks at another position, so from there on only response positions are computed.

    Args:
        model (TransformerDecoder): with LoRA; sharded or not.
        pad_id (int): id to pad batches with.
        device (torch.device): where batches go.
    """

    def __init__(self, model: TransformerDecoder, pad_id: int, device: torch.device) -> None:
        super().__init__(pad_id, device)
        self.model = model
        self.head = TorchtuneHead(model)
        self._stochastic = {
            m: m.attn_dropout for m in model.modules() if isinstance(m, MultiHeadAttention) and m.attn_dropout
        }
        *_, last = layers = [m for m in model.modules() if isinstance(m, TransformerSelfAttentionLayer)]
        attentions = [layer.attn for layer in layers if isinstance(layer.attn, MultiHeadAttention)]
        if len(attentions) == len(layers):  # Gemma 2 has another attention, with caps and windows
            self.longest_shared = model.max_seq_len
            for attention in attentions:
                attention._attention_call = partial(_attention, attention._attention_call)
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
        network: Any = self.model
        return self._read(network.norm(hidden)[0], self.head)

    def run(self, batch: Batch, read: Callable[[torch.Tensor, TrainableHead], Any]) -> Any:
        self._index, self._read = batch.index, read
        if batch.shared is None:
            return self.model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos)
        network: Any = self.model
        longest, network.max_seq_len = network.max_seq_len, batch.tokens.shape[1]  # each row is short enough
        try:
            with torch.compiler.set_stance("force_eager"):  # layouts differ, and each would be compiled
                return network(batch.tokens, mask=batch.shared, input_pos=batch.input_pos)
        finally:
            network.max_seq_len = longest

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Adapters and the dropout of attention are off: a reference is the same each time it is read."""
        for attention in self._stochastic:
            attention.attn_dropout = 0.0
        try:
            with disable_adapter(self.model):
                yield
        finally:
            for attention, dropout in self._stochastic.items():
                attention.attn_dropout = dropout
