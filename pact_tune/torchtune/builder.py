"""A model builder that reads the network from the checkpoint itself: Llama, Qwen2 and Gemma 2, tied or not."""

from pathlib import Path
from typing import Any

from torch import nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import LORA_ATTN_MODULES, DoRALinear, LoRALinear

from pact_tune.errors import UserError
from pact_tune.families import FAMILIES, Network, published_network
from pact_tune.torchtune import gemma2
from pact_tune.weights import ModelFolder


def from_checkpoint(
    path: str,
    lora_attn_modules: list[LORA_ATTN_MODULES] = (),  # type: ignore[assignment]  # a config's list; its default cannot change
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    max_seq_len: int | None = None,
) -> TransformerDecoder:
    """The network that a checkpoint's config.json describes, its weights not yet loaded.

    Without any LoRA all weights are trained. Where the folder is not there and is called like a published model, the
    published sizes are used, so that a config can be checked without a download.

    Args:
        path (str): folder of a Hugging Face checkpoint.
        lora_attn_modules (list[LORA_ATTN_MODULES]): of "q_proj", "k_proj", "v_proj", "output_proj".
        apply_lora_to_mlp (bool): LoRA on the three linear layers of each feed-forward.
        apply_lora_to_output (bool): LoRA on the head; a tied head takes none.
        lora_rank (int | None): r; needed where there is LoRA.
        lora_alpha (float | None): LoRA is scaled by alpha / r; needed where there is LoRA.
        lora_dropout (float): on LoRA's input.
        use_dora (bool): DoRA instead of LoRA.
        quantize_base (bool): linear layers of the decoder in NF4 (QLoRA).
        max_seq_len (int | None): longest row in tokens; None is what config.json says.

    Returns:
        TransformerDecoder: the model, on the current device and in the current dtype.

    Raises:
        UserError: no checkpoint there, or a network that these layers do not compute.
    """
    network = network_at(path)
    adapters = bool(lora_attn_modules or apply_lora_to_mlp or apply_lora_to_output)
    given = [key for key, value in (("lora_rank", lora_rank), ("lora_alpha", lora_alpha)) if value is not None]
    others = [key for key, value in (("use_dora", use_dora), ("quantize_base", quantize_base)) if value]
    if not adapters and (unused := [*given, *others]):
        raise UserError(
            f"model.{unused[0]} needs layers with an adapter: name them in model.lora_attn_modules, or leave all keys of LoRA "
            "out to train all weights."
        )
    if adapters and len(given) < 2:
        raise UserError("model.lora_rank and model.lora_alpha must both be given where layers have an adapter.")
    if apply_lora_to_output and network.tied:
        raise UserError("model.apply_lora_to_output: this model's head is its embedding (tied) and takes no LoRA.")
    lora = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout}
    if network.family == "gemma2":
        model = _gemma2(
            network, max_seq_len, adapters, lora, use_dora, quantize_base, lora_attn_modules, apply_lora_to_mlp
        )
    else:
        linear = _Linear(lora, DoRALinear if use_dora else LoRALinear, quantize_base)
        model = _decoder(network, max_seq_len, linear, lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output)
        if quantize_base:  # state_dict() then gives plain tensors, as with torchtune's own builders
            _register_reparametrize_state_dict_hooks(model, dtype=model.tok_embeddings.weight.dtype)
    return model


def network_at(path: str) -> Network:
    """The network of a checkpoint folder, or of the published model that it is called like.

    Args:
        path (str): the folder; may be missing.

    Returns:
        Network: see :func:`pact_tune.families.network_of`.

    Raises:
        UserError: no checkpoint there and no known name, or an unknown network.
    """
    published = None if (Path(path) / "config.json").is_file() else published_network(path)
    return published or ModelFolder(path, "model.path").network


class _Linear:
    """Makes the linear layers: plain, with an adapter, in NF4."""

    def __init__(self, lora: dict[str, Any], adapter: type[LoRALinear] | type[DoRALinear], quantize: bool) -> None:
        self.lora, self.adapter, self.quantize = lora, adapter, quantize

    def __call__(self, inputs: int, outputs: int, adapted: bool, bias: bool = False) -> nn.Module:
        if adapted:
            return self.adapter(inputs, outputs, **self.lora, use_bias=bias, quantize_base=self.quantize)
        if self.quantize and not bias:  # torchtune's frozen layer knows no bias
            return FrozenNF4Linear(inputs, outputs)
        return nn.Linear(inputs, outputs, bias=bias)

    def head(self, inputs: int, outputs: int, adapted: bool) -> nn.Module:
        return self.adapter(inputs, outputs, **self.lora) if adapted else nn.Linear(inputs, outputs, bias=False)


def _decoder(
    network: Network, max_seq_len: int | None, linear: _Linear, attention: list[str], mlp: bool, head: bool
) -> TransformerDecoder:
    """A Llama or Qwen2; ``attention`` names projections with an adapter, ``mlp`` and ``head`` say whether these have one."""
    dim, inner, length = network.dim, network.intermediate_dim, max_seq_len or network.max_seq_len
    queries, keys = network.num_heads * network.head_dim, network.num_kv_heads * network.head_dim
    bias = FAMILIES[network.family].qkv_bias
    rotary = _rotary(network, length)

    def layer() -> TransformerSelfAttentionLayer:
        return TransformerSelfAttentionLayer(
            attn=MultiHeadAttention(
                embed_dim=dim,
                num_heads=network.num_heads,
                num_kv_heads=network.num_kv_heads,
                head_dim=network.head_dim,
                q_proj=linear(dim, queries, "q_proj" in attention, bias),
                k_proj=linear(dim, keys, "k_proj" in attention, bias),
                v_proj=linear(dim, keys, "v_proj" in attention, bias),
                output_proj=linear(queries, dim, "output_proj" in attention),
                pos_embeddings=rotary,
                max_seq_len=length,
            ),
            mlp=FeedForward(
                gate_proj=linear(dim, inner, mlp), down_proj=linear(inner, dim, mlp), up_proj=linear(dim, inner, mlp)
            ),
            sa_norm=RMSNorm(dim, eps=network.norm_eps),
            mlp_norm=RMSNorm(dim, eps=network.norm_eps),
        )

    embedding = nn.Embedding(network.vocab_size, dim)
    return TransformerDecoder(
        tok_embeddings=embedding,
        layers=nn.ModuleList(layer() for _ in range(network.num_layers)),
        max_seq_len=length,
        num_heads=network.num_heads,
        head_dim=network.head_dim,
        norm=RMSNorm(dim, eps=network.norm_eps),
        output=TiedLinear(embedding) if network.tied else linear.head(dim, network.vocab_size, head),
    )


def _rotary(network: Network, length: int) -> nn.Module:
    if network.rope_scaling is None:
        kind = RotaryPositionalEmbeddings if FAMILIES[network.family].interleaved else Qwen2RotaryPositionalEmbeddings
        return kind(network.head_dim, length, network.rope_base)
    if not FAMILIES[network.family].interleaved:
        raise UserError("torchtune has no llama3 rotary scaling for this family: use pact_tune.hf.causal_lm.")
    factor, low, high, original = network.rope_scaling
    return Llama3ScaledRoPE(network.head_dim, length, network.rope_base, factor, low, high, int(original))


def _gemma2(
    network: Network,
    max_seq_len: int | None,
    adapters: bool,
    lora: dict[str, Any],
    use_dora: bool,
    quantize_base: bool,
    attention: list[str],
    mlp: bool,
) -> TransformerDecoder:
    windows = [window for window in network.sliding_windows or () if window is not None]
    sizes: dict[str, Any] = {
        "vocab_size": network.vocab_size,
        "num_layers": network.num_layers,
        "num_heads": network.num_heads,
        "head_dim": network.head_dim,
        "num_kv_heads": network.num_kv_heads,
        "embed_dim": network.dim,
        "intermediate_dim": network.intermediate_dim,
        "max_seq_len": max_seq_len or network.max_seq_len,
        "norm_eps": network.norm_eps,
        "rope_base": network.rope_base,
        "attn_logit_softcap": network.attention_cap,
        "final_logit_softcap": network.final_cap,
        "sliding_window_size": windows[0] if windows else None,
        "query_pre_attn_scalar": network.query_scalar,
    }
    if not adapters:
        return gemma2.gemma2(**sizes)
    options = {f"lora_{key}": value for key, value in lora.items()}
    return gemma2.lora_gemma2(attention, mlp, **sizes, **options, use_dora=use_dora, quantize_base=quantize_base)
