"""Gemma 2, composed from torchtune's parts with what its own builder gets wrong put right.

torchtune 0.6.1 applies the final soft-cap to the hidden state instead of the logits, and gives its 2B and 9B builders the two caps exchanged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torchtune.models.gemma2 import _component_builders as torchtune_gemma2
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks
from torchtune.modules.peft import LORA_ATTN_MODULES


def soft_cap(logits: torch.Tensor, cap: float) -> torch.Tensor:
    """Squeezes logits into (-cap, cap); elementwise, so it may follow a selection of columns."""
    return cap * torch.tanh(logits / cap)


class Gemma2Decoder(TransformerDecoder):
    """A decoder whose logits are soft-capped.

    Args:
        logit_softcap (float): final_logit_softcapping of the checkpoint's config.
        **parts (Any): of :class:`torchtune.modules.TransformerDecoder`.
    """

    def __init__(self, logit_softcap: float, **parts: Any) -> None:
        super().__init__(**parts)
        self.logit_softcap = logit_softcap

    def unembed(self, h: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]`` float32 of the last layer's output ``[B, S, H]``."""
        return soft_cap(self.output(self.norm(h)).float(), self.logit_softcap)


def gemma2(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    norm_eps: float = 1e-6,
    rope_base: int = 10_000,
    attn_logit_softcap: float = 50.0,
    final_logit_softcap: float = 30.0,
    sliding_window_size: int = 4096,
    query_pre_attn_scalar: int | None = None,
) -> Gemma2Decoder:
    """A Gemma 2 without adapters; arguments as :func:`lora_gemma2`."""
    return _build(torchtune_gemma2.gemma2, **locals())


def lora_gemma2(
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    norm_eps: float = 1e-6,
    rope_base: int = 10_000,
    attn_logit_softcap: float = 50.0,
    final_logit_softcap: float = 30.0,
    sliding_window_size: int = 4096,
    query_pre_attn_scalar: int | None = None,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> Gemma2Decoder:
    """A Gemma 2 with LoRA. The head is tied to the embedding, so it takes none.

    Args:
        lora_attn_modules (list[LORA_ATTN_MODULES]): of "q_proj", "k_proj", "v_proj", "output_proj".
        apply_lora_to_mlp (bool): LoRA on the three linear layers of each feed-forward.
        vocab_size (int): rows of the embedding.
        num_layers (int): every second one, from the first, attends within the sliding window only.
        num_heads (int): query heads.
        head_dim (int): size of a head.
        num_kv_heads (int): key and value heads.
        embed_dim (int): hidden size.
        intermediate_dim (int): inner size of the feed-forward.
        max_seq_len (int): longest sequence, in tokens.
        norm_eps (float): of the RMS norms.
        rope_base (int): of the rotary embedding.
        attn_logit_softcap (float): cap of the attention scores.
        final_logit_softcap (float): cap of the logits.
        sliding_window_size (int): in tokens.
        query_pre_attn_scalar (int | None): queries are divided by its square root; None is ``head_dim``.
        lora_rank (int): r.
        lora_alpha (float): LoRA is scaled by alpha / r.
        lora_dropout (float): on LoRA's input.
        use_dora (bool): DoRA instead of LoRA.
        quantize_base (bool): the base weights of all linear layers in NF4.

    Returns:
        Gemma2Decoder: the model.
    """
    model = _build(torchtune_gemma2.lora_gemma2, **locals())
    if quantize_base:  # state_dict() then gives plain tensors, as with torchtune's other builders
        _register_reparametrize_state_dict_hooks(model, dtype=model.tok_embeddings.weight.dtype)
    return model


def _build(
    builder: Callable[..., TransformerDecoder], *, attn_logit_softcap: float, final_logit_softcap: float, **sizes: Any
) -> Gemma2Decoder:
    """The parts of torchtune's model in a decoder that caps the logits, and not the hidden state."""
    model = builder(hidden_capping_value=attn_logit_softcap, **sizes)
    return Gemma2Decoder(
        logit_softcap=final_logit_softcap,
        tok_embeddings=model.tok_embeddings,
        layers=model.layers,
        max_seq_len=model.max_seq_len,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
        norm=model.norm.rms_norm,
        output=model.output,
    )
