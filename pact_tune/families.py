"""The model families: what their config.json says of the network, and the published models of each.

A family is one record of :data:`FAMILIES`; a published model is one line of :data:`MODELS`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pact_tune.errors import UserError

ANY_MODEL = "use model._component_: pact_tune.hf.causal_lm, which trains any transformers model"
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one kind of decoder apart from the others.

    Attributes:
        architecture (str): class name in config.json, for those that do not name a model_type.
        activation (str): of the feed-forward, as config.json names it.
        qkv_bias (bool): query, key and value projections have a bias.
        interleaved (bool): torchtune keeps the two halves of each rotary pair side by side, Hugging Face apart: the rows
            of query and key weights are permuted between them.
    """

    architecture: str
    activation: str = "silu"
    qkv_bias: bool = False
    interleaved: bool = True


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, interleaved=False),
    "gemma2": Family("Gemma2ForCausalLM", activation="gelu_pytorch_tanh"),
}


@dataclasses.dataclass(frozen=True)
class Network:
    """Everything that decides what a checkpoint's network computes, beside its weights; equal networks compare equal.

    Attributes:
        family (str): key of :data:`FAMILIES`.
        vocab_size (int): rows of the embedding.
        num_layers (int): decoder layers.
        dim (int): hidden size.
        num_heads (int): query heads.
        num_kv_heads (int): key and value heads.
        head_dim (int): size of a head.
        intermediate_dim (int): inner size of the feed-forward.
        max_seq_len (int): longest row, in tokens.
        norm_eps (float): of the RMS norms.
        rope_base (float): of the rotary embedding.
        rope_scaling (tuple[float, ...] | None): values of :data:`LLAMA3_SCALING`; None without scaling.
        tied (bool): the head is the embedding.
        attention_cap (float | None): soft-cap of attention scores (Gemma 2).
        final_cap (float | None): soft-cap of logits (Gemma 2).
        query_scalar (float | None): queries are divided by its square root; None: ``head_dim``.
        sliding_windows (tuple[int | None, ...] | None): of each layer, in tokens (Gemma 2).
    """

    family: str
    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float
    rope_scaling: tuple[float, ...] | None
    tied: bool
    attention_cap: float | None = None
    final_cap: float | None = None
    query_scalar: float | None = None
    sliding_windows: tuple[int | None, ...] | None = None

    def interleave(self, module: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a module's weight from Hugging Face's order to torchtune's.

        Args:
            module (str): its name, Hugging Face's or torchtune's.
            rows (torch.Tensor): ``[out, ...]``.

        Returns:
            torch.Tensor: the same shape; only rows of interleaved query and key projections move.
        """
        if not self._permuted(module):
            return rows
        return rows.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2)

    def deinterleave(self, module: str, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`interleave`."""
        if not self._permuted(module):
            return rows
        return rows.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)

    def _permuted(self, module: str) -> bool:
        return FAMILIES[self.family].interleaved and module.endswith(("q_proj", "k_proj"))


def model_type(config: Mapping[str, Any], where: str) -> str:
    """The family of a config.json.

    Args:
        config (Mapping[str, Any]): its content.
        where (str): its folder, for people.

    Returns:
        str: key of :data:`FAMILIES`.

    Raises:
        UserError: another family, with the route that knows it.
    """
    architectures = config.get("architectures") or ()
    named = config.get("model_type") or next(
        (name for name, family in FAMILIES.items() if family.architecture in architectures), None
    )
    if named is None:
        raise UserError(f"'{where}/config.json' names no model_type: add the line that the original checkpoint has.")
    if named not in FAMILIES:
        raise UserError(
            f"'{where}' holds a {named} model, which torchtune's layers cannot compute (they know {', '.join(FAMILIES)}): "
            f"{ANY_MODEL}."
        )
    return named


def network_of(config: Mapping[str, Any], where: str) -> Network:
    """What a config.json says of the network, with transformers' defaults for keys that it lacks.

    Args:
        config (Mapping[str, Any]): as transformers 4 or 5 writes it.
        where (str): its folder, for people.

    Returns:
        Network: the same for all ways of writing the same network.

    Raises:
        UserError: a network that torchtune's layers do not compute.
    """
    from transformers import AutoConfig  # here: it takes a second

    family = model_type(config, where)
    if "quantization_config" in config:
        raise UserError(
            f"The checkpoint in '{where}' is quantised already: name the original one (QLoRA quantises it)."
        )
    given = {key: value for key, value in config.items() if key != "model_type"}
    full = AutoConfig.for_model(family, **given).to_dict()
    _refuse_other_networks(full, family, where)
    dim, heads = full["hidden_size"], full["num_attention_heads"]
    fields: dict[str, Any] = {}
    if family == "gemma2":
        window, kinds = full["sliding_window"], full["layer_types"]
        fields = {
            "attention_cap": float(full["attn_logit_softcapping"]),
            "final_cap": float(full["final_logit_softcapping"]),
            "query_scalar": float(full["query_pre_attn_scalar"]),
            "sliding_windows": tuple(window if kind == "sliding_attention" else None for kind in kinds),
        }
    rope = _rope(full)
    return Network(
        family=family,
        vocab_size=full["vocab_size"],
        num_layers=full["num_hidden_layers"],
        dim=dim,
        num_heads=heads,
        num_kv_heads=full["num_key_value_heads"] or heads,
        head_dim=full.get("head_dim") or dim // heads,
        intermediate_dim=full["intermediate_size"],
        max_seq_len=full["max_position_embeddings"],
        norm_eps=rounded(full["rms_norm_eps"]),
        rope_base=float(rope["rope_theta"]),
        rope_scaling=rope_scaling([rope[key] for key in LLAMA3_SCALING]) if _kind(rope) == "llama3" else None,
        tied=bool(full["tie_word_embeddings"]),
        **fields,
    )


def rope_scaling(values: Any) -> tuple[float, ...] | None:
    """Values of :data:`LLAMA3_SCALING` in one form; a factor of 1 scales nothing, which is None."""
    scaling = tuple(float(value) for value in values)
    return None if scaling[0] == 1 else scaling


def rounded(value: float) -> float:
    """A constant without the noise of having been a float32 (9.99999975e-06 is 1e-5)."""
    return float(f"{value:.6g}")


def _rope(full: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under transformers 5's names; transformers 4 keeps rope_theta and rope_scaling apart."""
    rope = full.get("rope_parameters") or {"rope_theta": full.get("rope_theta"), **(full.get("rope_scaling") or {})}
    return dict(rope)


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _refuse_other_networks(full: Mapping[str, Any], family: str, where: str) -> None:
    """Raises UserError for what would train a slightly wrong network without a word."""
    activation = full.get("hidden_activation") or full.get("hidden_act")
    expected = FAMILIES[family].activation
    different = {
        f"hidden_act is {activation}, not {expected}": activation != expected,
        f"rope_type is {_kind(_rope(full))}": _kind(_rope(full)) not in ("default", "llama3"),
        "its linear layers have biases": full.get("attention_bias") or full.get("mlp_bias"),
        "it has a sliding window": family != "gemma2" and "sliding_attention" in (full.get("layer_types") or ()),
        "it rotates a part of each head only": full.get("partial_rotary_factor", 1) != 1,
    }
    if reasons := [reason for reason, found in different.items() if found]:
        raise UserError(
            f"The checkpoint in '{where}' is a {family} network that torchtune's layers do not compute "
            f"({'; '.join(reasons)}): {ANY_MODEL}."
        )


# --- published models


class Model(NamedTuple):
    """A published model.

    Attributes:
        aligned (str): Hub name of the aligned model.
        base (str | None): Hub name of the pre-trained model that it was made from; None where none was published.
        published (str | None): repository of its safety tokens, once somebody published them.
        config (Mapping[str, Any]): what its config.json says of the network.
    """

    aligned: str
    base: str | None
    published: str | None = None
    config: Mapping[str, Any] = {}  # noqa: RUF012 (never changed)


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
_QWEN = {
    "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "vocab_size": 152064,
    "tie_word_embeddings": False,
}  # fmt: skip
_QWEN_TIED = _QWEN | {"vocab_size": 151936, "tie_word_embeddings": True}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
_LLAMA = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "vocab_size": 128256, "rope_scaling": _LLAMA3_ROPE, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA_3_2 = _LLAMA | {"rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}
_GEMMA = {
    "model_type": "gemma2", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 8192,
    "vocab_size": 256000, "head_dim": 256, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0, "sliding_window": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def _qwen(size: str, config: Mapping[str, Any], *sizes: int) -> Model:
    return _model(f"Qwen/Qwen2.5-{size}-Instruct", f"Qwen/Qwen2.5-{size}", config, *sizes)


def _llama(version: str, size: str, config: Mapping[str, Any], *sizes: int, base_version: str | None = None) -> Model:
    base = f"meta-llama/Llama-{base_version or version}-{size}"
    return _model(f"meta-llama/Llama-{version}-{size}-Instruct", base, config, *sizes)


def _gemma(size: str, config: Mapping[str, Any], *sizes: int) -> Model:
    return _model(f"google/gemma-2-{size}-it", f"google/gemma-2-{size}", config, *sizes)


def _model(aligned: str, base: str | None, config: Mapping[str, Any], *sizes: int) -> Model:
    return Model(aligned, base, None, {**config, **dict(zip(_SIZES, sizes, strict=True))})


# Of other families, which transformers computes (pact_tune.hf.causal_lm).
_QWEN3 = {
    "model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960, "vocab_size": 151936,
    "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3_TIED = _QWEN3 | {"tie_word_embeddings": True}
_GEMMA3_TEXT = {
    "vocab_size": 262144, "head_dim": 256, "query_pre_attn_scalar": 256, "max_position_embeddings": 32768,
    "sliding_window": 512, "tie_word_embeddings": True,
}  # fmt: skip
_MISTRAL = {
    "model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 32768, "vocab_size": 32768,
    "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
# Its "longrope" tables are left out: they change no size.
_PHI4_MINI = {
    "model_type": "phi3", "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "vocab_size": 200064,
    "tie_word_embeddings": True, "pad_token_id": 199999,
}  # fmt: skip
_SMOLLM2 = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192,
    "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
_SMOLLM3 = {
    "model_type": "smollm3", "rms_norm_eps": 1e-6, "rope_theta": 5e6, "max_position_embeddings": 65536,
    "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
_OLMO2 = {
    "model_type": "olmo2", "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "max_position_embeddings": 4096,
    "vocab_size": 100352, "tie_word_embeddings": False,
}  # fmt: skip


def _qwen3(size: str, config: Mapping[str, Any], *sizes: int, base: bool = True) -> Model:
    return _model(f"Qwen/Qwen3-{size}", f"Qwen/Qwen3-{size}-Base" if base else None, config, *sizes)


def _gemma3_text(size: str, *sizes: int) -> Model:
    config = {"model_type": "gemma3_text", **_GEMMA3_TEXT}
    return _model(f"google/gemma-3-{size}-it", f"google/gemma-3-{size}-pt", config, *sizes)


def _gemma3(size: str, *sizes: int) -> Model:
    """Those that see images too: the sizes are the language model's."""
    text = _GEMMA3_TEXT | {"vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window": 1024}
    text |= dict(zip(_SIZES, sizes, strict=True))
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 896, "patch_size": 14,
    }  # fmt: skip
    config = {"model_type": "gemma3", "text_config": text, "vision_config": vision, "mm_tokens_per_image": 256}
    return Model(f"google/gemma-3-{size}-it", f"google/gemma-3-{size}-pt", None, config)


def _smollm2(size: str, config: Mapping[str, Any], *sizes: int) -> Model:
    return _model(f"HuggingFaceTB/SmolLM2-{size}-Instruct", f"HuggingFaceTB/SmolLM2-{size}", config, *sizes)


def _olmo2(name: str, *sizes: int) -> Model:
    return _model(f"allenai/OLMo-2-{name}-Instruct", f"allenai/OLMo-2-{name}", _OLMO2, *sizes)


# Short name -> model, sizes in the order of _SIZES. The one place that names the known models.
MODELS: dict[str, Model] = {
    "qwen2.5-0.5b-instruct": _qwen("0.5B", _QWEN_TIED, 896, 24, 14, 2, 4864),
    "qwen2.5-1.5b-instruct": _qwen("1.5B", _QWEN_TIED, 1536, 28, 12, 2, 8960),
    "qwen2.5-3b-instruct": _qwen("3B", _QWEN_TIED, 2048, 36, 16, 2, 11008),
    "qwen2.5-7b-instruct": _qwen("7B", _QWEN, 3584, 28, 28, 4, 18944),
    "qwen2.5-14b-instruct": _qwen("14B", _QWEN, 5120, 48, 40, 8, 13824),
    "qwen2.5-32b-instruct": _qwen("32B", _QWEN, 5120, 64, 40, 8, 27648),
    "qwen2.5-72b-instruct": _qwen("72B", _QWEN, 8192, 80, 64, 8, 29568),
    "llama-3.1-8b-instruct": _llama("3.1", "8B", _LLAMA, 4096, 32, 32, 8, 14336),
    "llama-3.1-70b-instruct": _llama("3.1", "70B", _LLAMA, 8192, 80, 64, 8, 28672),
    "llama-3.2-1b-instruct": _llama("3.2", "1B", _LLAMA_3_2, 2048, 16, 32, 8, 8192),
    "llama-3.2-3b-instruct": _llama("3.2", "3B", _LLAMA_3_2, 3072, 28, 24, 8, 8192),
    # 3.3 has no base model of its own
    "llama-3.3-70b-instruct": _llama("3.3", "70B", _LLAMA, 8192, 80, 64, 8, 28672, base_version="3.1"),
    "gemma-2-2b-it": _gemma("2b", _GEMMA, 2304, 26, 8, 4, 9216),
    "gemma-2-9b-it": _gemma("9b", _GEMMA, 3584, 42, 16, 8, 14336),
    "gemma-2-27b-it": _gemma("27b", _GEMMA | {"head_dim": 128, "query_pre_attn_scalar": 144}, 4608, 46, 32, 16, 36864),
    "qwen3-0.6b": _qwen3("0.6B", _QWEN3_TIED, 1024, 28, 16, 8, 3072),
    "qwen3-1.7b": _qwen3("1.7B", _QWEN3_TIED, 2048, 28, 16, 8, 6144),
    "qwen3-4b": _qwen3("4B", _QWEN3_TIED, 2560, 36, 32, 8, 9728),
    "qwen3-8b": _qwen3("8B", _QWEN3, 4096, 36, 32, 8, 12288),
    "qwen3-14b": _qwen3("14B", _QWEN3, 5120, 40, 40, 8, 17408),
    "qwen3-32b": _qwen3("32B", _QWEN3, 5120, 64, 64, 8, 25600, base=False),
    "gemma-3-270m-it": _gemma3_text("270m", 640, 18, 4, 1, 2048),
    "gemma-3-1b-it": _gemma3_text("1b", 1152, 26, 4, 1, 6912),
    "gemma-3-4b-it": _gemma3("4b", 2560, 34, 8, 4, 10240),
    "gemma-3-12b-it": _gemma3("12b", 3840, 48, 16, 8, 15360),
    "mistral-7b-instruct-v0.3": _model(
        "mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3", _MISTRAL, 4096, 32, 32, 8, 14336
    ),
    "phi-4-mini-instruct": _model("microsoft/Phi-4-mini-instruct", None, _PHI4_MINI, 3072, 32, 24, 8, 8192),
    "smollm2-135m-instruct": _smollm2("135M", _SMOLLM2, 576, 30, 9, 3, 1536),
    "smollm2-360m-instruct": _smollm2("360M", _SMOLLM2, 960, 32, 15, 5, 2560),
    "smollm2-1.7b-instruct": _smollm2("1.7B", _SMOLLM2 | {"rope_theta": 130000.0}, 2048, 24, 32, 32, 8192),
    "smollm3-3b": _model("HuggingFaceTB/SmolLM3-3B", "HuggingFaceTB/SmolLM3-3B-Base", _SMOLLM3, 2048, 36, 16, 4, 11008),
    "olmo-2-0425-1b-instruct": _olmo2("0425-1B", 2048, 16, 16, 16, 8192),
    "olmo-2-1124-7b-instruct": _olmo2("1124-7B", 4096, 32, 32, 32, 11008),
    "olmo-2-1124-13b-instruct": _olmo2("1124-13B", 5120, 40, 40, 40, 13824),
}


def published_config(folder: str) -> Mapping[str, Any] | None:
    """What config.json says of a published model whose Hub name ends like a folder's; None where no known model is called so."""
    name = Path(folder).name.lower()
    model = next((m for m in MODELS.values() if name == m.aligned.split("/")[1].lower()), None)
    return model.config if model else None


@functools.cache
def published_network(folder: str) -> Network | None:
    """The network of a published model whose Hub name ends like a folder's, for configs without a checkpoint at hand.

    Args:
        folder (str): such as "/tmp/Qwen2.5-7B-Instruct".

    Returns:
        Network | None: None where no known model is called that.
    """
    config = published_config(folder)
    return network_of(config, folder) if config else None
