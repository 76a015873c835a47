"""Hugging Face checkpoints in and out of torchtune's naming: base weights, merged models and PEFT adapters."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torchtune.models.convert_weights import hf_to_tune, tune_to_hf
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune, qwen2_tune_to_hf

from pact_tune.errors import UserError, unknown_key
from pact_tune.files import atomic_folder
from pact_tune.stamp import STAMP_FILE, fingerprint, write_stamp
from pact_tune.torchtune import gemma2
from pact_tune.torchtune.lora import LoRASpec

StateDict = dict[str, torch.Tensor]
# checkpointer.model_type -> (model_type of config.json, to torchtune, to Hugging Face)
FAMILIES: dict[str, tuple[str, Callable, Callable]] = {
    "QWEN2": ("qwen2", qwen2_hf_to_tune, qwen2_tune_to_hf),
    "LLAMA3": ("llama", hf_to_tune, tune_to_hf),
    "LLAMA3_2": ("llama", hf_to_tune, tune_to_hf),
    "GEMMA2": ("gemma2", gemma2.hf_to_tune, gemma2.tune_to_hf),
}
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class HFCheckpointer:
    """Reads a Hugging Face checkpoint folder; writes merged checkpoints and PEFT adapters.

    Args:
        checkpoint_dir (str): folder with config.json and safetensors files.
        model_type (str): "QWEN2" (Qwen2, Qwen2.5), "LLAMA3" (Llama 3, 3.1, 3.3), "LLAMA3_2" or "GEMMA2".
        output_dir (str): where the recipe's results go.

    Raises:
        UserError: no checkpoint there, or one of another family.
    """

    def __init__(self, checkpoint_dir: str, model_type: str, output_dir: str) -> None:
        if model_type not in FAMILIES:
            raise unknown_key(model_type, FAMILIES, "checkpointer.model_type")
        self.directory = Path(checkpoint_dir)
        self.output_dir = Path(output_dir)
        if not (self.directory / "config.json").is_file():
            raise UserError(
                f"There is no Hugging Face checkpoint in '{checkpoint_dir}' (no config.json): download one with "
                "`tune download`, or correct checkpointer.checkpoint_dir."
            )
        self.config = json.loads((self.directory / "config.json").read_text())
        expected, self._to_tune, self._to_hf = FAMILIES[model_type]
        if self.config["model_type"] != expected:
            raise UserError(
                f"checkpointer.model_type is {model_type}, but '{checkpoint_dir}' holds a {self.config['model_type']} "
                "model: name its family, and a model builder of that family."
            )
        self.files = self._weight_files()

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.config["vocab_size"]

    def _weight_files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        for name in names:
            if not (self.directory / name).is_file():
                raise UserError(f"The checkpoint in '{self.directory}' lacks {name}: download it again.")
        return [self.directory / name for name in names]

    @functools.cached_property
    def weights_hash(self) -> str:
        """Hash of the weight files' bytes and of config.json: which model this is, whatever its folder is called."""

        def file_hash(path: Path) -> bytes:
            with path.open("rb") as file:
                return hashlib.file_digest(file, hashlib.blake2b).digest()

        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
            digests = b"".join(pool.map(file_hash, self.files))
        config = json.dumps(self.config, sort_keys=True).encode()
        return hashlib.blake2b(digests + config, digest_size=16).hexdigest()

    @property
    def _shape(self) -> dict[str, Any]:
        config = self.config
        heads = config["num_attention_heads"]
        return {
            "num_heads": heads,
            "num_kv_heads": config["num_key_value_heads"],
            "dim": config["hidden_size"],
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        }

    @property
    def _tied(self) -> dict[str, bool]:
        # Only Qwen2's converters are told; the others go by the keys that are there.
        return (
            {"tie_word_embeddings": self.config.get("tie_word_embeddings", False)}
            if self._to_hf is qwen2_tune_to_hf
            else {}
        )

    def load(self) -> StateDict:
        """The base weights under torchtune's names, on the CPU.

        Raises:
            UserError: a damaged file, or weights that this family does not have.
        """
        weights: StateDict = {}
        for file in self.files:
            try:
                weights |= load_file(file)
            except SafetensorError as error:
                raise UserError(f"'{file}' is damaged ({error}): download it again.") from error
        if self.config.get("tie_word_embeddings", False):
            weights.pop("lm_head.weight", None)
        try:
            return self._to_tune(weights, **self._shape, **self._tied)
        except Exception as error:  # torchtune raises the base class for a name that it does not know
            raise UserError(
                f"The weights in '{self.directory}' are not those of a plain {self.config['model_type']} model ({error}): "
                "name an original checkpoint, not one that was quantised or otherwise changed."
            ) from error

    def to_hf(self, weights: StateDict) -> StateDict:
        """Weights under torchtune's names to Hugging Face's."""
        return self._to_hf(weights, **self._shape, **self._tied)

    def check(self, model: nn.Module, weights: StateDict) -> None:
        """Makes sure that a model builder makes the very network that the checkpoint is of.

        Args:
            model (nn.Module): as built; may lie on the meta device.
            weights (StateDict): all its weights, from :meth:`load` and the adapter.

        Raises:
            UserError: names the first tensor or constant that differs.
        """
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        # Shapes do not show these, and a wrong one trains a slightly wrong network without a word.
        found |= constants_of_config(self.config)
        expected |= constants_of_model(model)
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise UserError(
                    f"The checkpoint in '{self.directory}' does not fit the model builder: {name} is "
                    f"{found.get(name, 'missing')} in the checkpoint and {expected.get(name, 'missing')} in the model; "
                    "name the builder of exactly this model in model._component_."
                )

    def save(
        self, name: str, base: StateDict | None, adapter: StateDict, spec: LoRASpec | None, stamp: dict[str, Any]
    ) -> Path:
        """Writes one result folder: a whole checkpoint where ``base`` is given, ``adapter/`` where ``spec`` is, pact.json.

        Args:
            name (str): folder below ``output_dir``.
            base (StateDict | None): weights under torchtune's names, on the CPU; they are not changed.
            adapter (StateDict): LoRA weights under torchtune's names, merged into ``base``; empty in full fine-tuning.
            spec (LoRASpec | None): rank, alpha and kind of the adapter; None in full fine-tuning.
            stamp (dict[str, Any]): how the model was made; goes to pact.json.

        Returns:
            Path: the folder; it appears whole or not at all.
        """
        directory = self.output_dir / name
        with atomic_folder(directory, marker=STAMP_FILE) as folder:
            if base is not None:
                merged = self.to_hf(merge(base, adapter, spec))
                self._write_model(folder, merged)
            if spec is None:
                stamp |= {"adapter": None, "weights": fingerprint(merged)}
            else:
                # In a folder of its own: transformers would otherwise load the adapter, not the weights beside it.
                (folder / "adapter").mkdir()
                peft = self.peft_adapter(adapter)
                self._write_adapter(folder / "adapter", peft, spec)
                stamp |= {"adapter": {**spec._asdict(), "fingerprint": fingerprint(peft)}}
                write_stamp(folder / "adapter", stamp)  # adapters are often published alone
            write_stamp(folder, stamp)
        return directory

    def _write_model(self, folder: Path, weights: StateDict) -> None:
        """Weights under Hugging Face's names, in shards, and whatever else lies beside the base's weights."""
        save_torch_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, folder)
        for file in self.directory.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
                shutil.copyfile(file, folder / file.name)

    def _write_adapter(self, folder: Path, peft: StateDict, spec: LoRASpec) -> None:
        save_file(peft, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.directory.resolve()),
            "r": spec.rank,
            "lora_alpha": spec.alpha,
            "use_dora": spec.dora,
            "target_modules": sorted({key.split(".")[-3] for key in peft if key.endswith(".lora_B.weight")}),
            "bias": "none",
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def peft_adapter(self, adapter: StateDict) -> StateDict:
        """LoRA or DoRA weights under PEFT's names.

        The rows of B belong to the rows of the base weight, so whatever the family's converter does to those (Llama: a
        permutation of the rotary dimensions; Qwen2: nothing), it does to B, and to DoRA's magnitudes; A is left as it is.
        torchtune's own exporter permutes for every family, and no magnitudes.

        Args:
            adapter (StateDict): "....lora_a.weight", "....lora_b.weight" and, for DoRA, "....magnitude" of each module.

        Returns:
            StateDict: "base_model.model.....lora_A.weight", B and "lora_magnitude_vector".
        """
        result: StateDict = {}
        for key, a in adapter.items():
            if not key.endswith(".lora_a.weight"):
                continue
            module = key.removesuffix(".lora_a.weight")
            prefix, b = self._rows_to_hf(module, adapter[f"{module}.lora_b.weight"])
            result[f"{prefix}.lora_A.weight"] = a.contiguous()
            result[f"{prefix}.lora_B.weight"] = b
            if f"{module}.magnitude" in adapter:
                _, magnitude = self._rows_to_hf(module, adapter[f"{module}.magnitude"][:, None])
                result[f"{prefix}.lora_magnitude_vector"] = magnitude[:, 0].contiguous()
        return result

    def _rows_to_hf(self, module: str, rows: torch.Tensor) -> tuple[str, torch.Tensor]:
        """PEFT's prefix of a module, and a tensor ``[out, n]`` that belongs to the rows of its weight, in HF's order."""
        shape = self._shape | {"dim": rows.shape[1]}
        ((hf_key, hf_rows),) = self._to_hf({f"{module}.weight": rows}, **shape, **self._tied).items()
        return "base_model.model." + hf_key.removesuffix(".weight"), hf_rows.contiguous()


def constants_of_config(config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's config.json says of the network beyond the shapes of its weights.

    Args:
        config (dict[str, Any]): config.json, as transformers 4 or 5 writes it.

    Returns:
        dict[str, Any]: under config.json's names.
    """
    rope = config.get("rope_parameters") or config  # transformers 4 has rope_theta and rope_scaling apart
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    constants = {
        "rms_norm_eps": config["rms_norm_eps"],
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": tuple(float(scaling[key]) for key in LLAMA3_SCALING) if kind == "llama3" else kind,
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
    }
    if config["model_type"] == "gemma2":
        layers = config["num_hidden_layers"]
        kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * (layers // 2 + 1)
        constants |= {
            "query_pre_attn_scalar": float(config["query_pre_attn_scalar"]),
            "attn_logit_softcapping": config["attn_logit_softcapping"],
            "final_logit_softcapping": config["final_logit_softcapping"],
            "sliding_window": [
                config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds[:layers]
            ],
        }
    elif config.get("use_sliding_window"):
        constants["use_sliding_window"] = True
    return constants


def constants_of_model(model: nn.Module) -> dict[str, Any]:
    """The same of a torchtune model.

    Args:
        model (nn.Module): may lie on the meta device.

    Returns:
        dict[str, Any]: under config.json's names.
    """
    attention = model.layers[0].attn
    rope = attention.pos_embeddings
    constants = {
        "rms_norm_eps": model.norm.eps,
        "rope_theta": float(rope.base),
        "rope_scaling": (
            tuple(map(float, (rope.scale_factor, rope.low_freq_factor, rope.high_freq_factor, rope.old_context_len)))
            if isinstance(rope, Llama3ScaledRoPE)
            else "default"
        ),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
    }
    if isinstance(model, gemma2.Gemma2Decoder):
        constants |= {
            "query_pre_attn_scalar": round(attention.scaling**-2, 6),
            "attn_logit_softcapping": attention.softcapping,
            "final_logit_softcapping": model.logit_softcap,
            "sliding_window": [layer.attn.sliding_window_size for layer in model.layers],
        }
    return constants


def merge(base: StateDict, adapter: StateDict, spec: LoRASpec | None) -> StateDict:
    """Base weights with the adapter merged; ``base`` is left as it is.

    torchtune's own function adds in place, which on the CPU changes the weights of the model that is still training.
    """
    merged = dict(base)
    for key, b in adapter.items():
        if key.endswith(".lora_b.weight"):
            module = key.removesuffix(".lora_b.weight")
            old, a = base[f"{module}.weight"], adapter[f"{module}.lora_a.weight"]
            merged[f"{module}.weight"] = merged_weight(old, a, b, adapter.get(f"{module}.magnitude"), spec)
    return merged


def merged_weight(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None, spec: LoRASpec
) -> torch.Tensor:
    """One weight with its adapter, computed in float32.

    LoRA: W' = W + alpha / rank * B A. DoRA: the rows of that, scaled to the learned magnitudes.

    Args:
        weight (torch.Tensor): W, ``[out, in]``.
        a (torch.Tensor): A, ``[rank, in]``.
        b (torch.Tensor): B, ``[out, rank]``.
        magnitude (torch.Tensor | None): DoRA's, ``[out]``; None for LoRA.
        spec (LoRASpec): rank and alpha.

    Returns:
        torch.Tensor: W', in W's dtype.
    """
    merged = weight.float() + spec.alpha / spec.rank * (b.float() @ a.float())
    if magnitude is not None:
        merged *= (magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.to(weight.dtype)
