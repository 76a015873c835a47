"""LoRA adapters in PEFT's format, under Hugging Face's names: arithmetic, files, merging."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pact_tune.errors import UserError
from pact_tune.weights import ModelFolder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


class LoRASpec(NamedTuple):
    """What a file of LoRA weights does not say of itself.

    Attributes:
        rank (int): r.
        alpha (float): the update is scaled by alpha / r.
        dora (bool): DoRA: the updated weight's rows are scaled to learned magnitudes.
    """

    rank: int
    alpha: float
    dora: bool


class Update(NamedTuple):
    """The adapter of one module.

    Attributes:
        a (torch.Tensor): A, ``[rank, in]``.
        b (torch.Tensor): B, ``[out, rank]``, rows in Hugging Face's order.
        magnitude (torch.Tensor | None): DoRA's, ``[out]``.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None


Adapter = dict[str, Update]  # by module, such as "model.layers.0.self_attn.q_proj"
# What an objective may do to a finished adapter: (A, B) of each module, to the same.
Finish = Callable[[dict[str, tuple[torch.Tensor, torch.Tensor]]], dict[str, tuple[torch.Tensor, torch.Tensor]]]


def merged_weight(weight: torch.Tensor, update: Update, spec: LoRASpec) -> torch.Tensor:
    """One weight with its adapter, computed in float32.

    LoRA: W' = W + alpha / rank * B A. DoRA: the rows of that, scaled to the learned magnitudes.

    Args:
        weight (torch.Tensor): W, ``[out, in]``.
        update (Update): the module's adapter.
        spec (LoRASpec): rank and alpha.

    Returns:
        torch.Tensor: W', in W's dtype.
    """
    merged = weight.float() + spec.alpha / spec.rank * (update.b.float() @ update.a.float())
    if update.magnitude is not None:
        merged *= (update.magnitude.float() / torch.linalg.norm(merged, dim=1))[:, None]
    return merged.to(weight.dtype)


def finished(adapter: Adapter, finish: Finish | None) -> Adapter:
    """An adapter after an objective's last word on A and B; magnitudes stay."""
    if finish is None:
        return adapter
    changed = finish({name: (update.a, update.b) for name, update in adapter.items()})
    return {name: Update(*changed[name], update.magnitude) for name, update in adapter.items()}


def peft_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """An adapter under PEFT's names."""
    tensors = {}
    for name, update in adapter.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = update.a.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = update.b.contiguous()
        if update.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = update.magnitude.contiguous()
    return tensors


def write_adapter(folder: Path, adapter: Adapter, spec: LoRASpec, base: Path) -> None:
    """Writes an adapter as PEFT reads it.

    Args:
        folder (Path): exists already.
        adapter (Adapter): its weights.
        spec (LoRASpec): rank, alpha and kind.
        base (Path): folder of the model that it belongs on.
    """
    save_file(peft_tensors(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_dora": spec.dora,
        "target_modules": sorted({name.split(".")[-1] for name in adapter}),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model; Axolotl puts the base's config.json beside it."""
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def read_adapter(folder: Path) -> tuple[Adapter, LoRASpec]:
    """Reads a LoRA or DoRA adapter that PEFT, or this package, wrote.

    Args:
        folder (Path): with adapter_config.json and adapter_model.safetensors.

    Returns:
        tuple[Adapter, LoRASpec]: by module; alpha is the one that scales by alpha / rank, also for rank-stabilised LoRA.

    Raises:
        UserError: none there, a damaged one, numbers that are not finite, or a kind that cannot be merged.
    """
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise UserError(f"There is no {WEIGHTS} in '{folder}': name the folder of a LoRA adapter.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"'{folder / WEIGHTS}' is damaged ({error}): take it from where it was made.") from error
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    adapter, used = {}, 0
    for prefix in modules:
        magnitude = tensors.get(
            f"{prefix}.lora_magnitude_vector", tensors.get(f"{prefix}.lora_magnitude_vector.weight")
        )
        if f"{prefix}.lora_B.weight" not in tensors:
            raise UserError(f"'{folder / WEIGHTS}' lacks {prefix}.lora_B.weight: take it from where it was made.")
        update = Update(tensors[f"{prefix}.lora_A.weight"], tensors[f"{prefix}.lora_B.weight"], magnitude)
        if update.a.ndim != 2 or update.b.ndim != 2 or len(update.a) != config["r"] or update.b.shape[1] != config["r"]:
            raise UserError(f"The shapes of {prefix} in '{folder / WEIGHTS}' are not those of rank {config['r']}.")
        adapter[prefix.removeprefix(PREFIX)] = update
        used += 2 + (magnitude is not None)
    if not adapter or used != len(tensors):
        raise UserError(f"'{folder / WEIGHTS}' holds more than LoRA weights, or none: only LoRA and DoRA can be read.")
    if broken := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"The adapter in '{folder}' holds NaN or infinity ({sorted(broken)[0]}): its training diverged."
        )
    alpha = config["lora_alpha"] * (math.sqrt(config["r"]) if config.get("use_rslora") else 1)
    return adapter, LoRASpec(config["r"], alpha, bool(config.get("use_dora")))


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind, numbers = config.get("peft_type"), (config["r"], config["lora_alpha"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"There is no {CONFIG} in '{folder}': name the folder of a LoRA adapter.") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"'{folder / CONFIG}' is damaged ({error}): take it from where it was made.") from error
    if kind != "LORA" or not all(isinstance(n, int | float) and n > 0 for n in numbers):
        raise UserError(
            f"'{folder / CONFIG}' is not of a LoRA adapter with positive r and lora_alpha: nothing else is read."
        )
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication"):
        if config.get(key):
            raise UserError(f"The adapter in '{folder}' has {key}, which is not supported: merge it with PEFT.")
    if config.get("bias", "none") != "none":
        raise UserError(f"The adapter in '{folder}' trains biases, which is not supported: merge it with PEFT.")
    return config


def check_fits(adapter: Adapter, base: ModelFolder, where: str) -> None:
    """Makes sure that an adapter belongs on a model.

    Args:
        adapter (Adapter): by module.
        base (ModelFolder): the model.
        where (str): the adapter's folder, for people.

    Raises:
        UserError: a module that the model lacks, or that has another shape there.
    """
    for module, update in adapter.items():
        name = f"{module}.weight"
        shape = base.shape(name) if name in base else None
        if shape != (len(update.b), update.a.shape[1]):
            raise UserError(
                f"The adapter in '{where}' does not fit the model in '{base.directory}': {name} is {shape or 'missing'} "
                f"there and {(len(update.b), update.a.shape[1])} in the adapter; name the model that it was trained on."
            )


def merge_folder(
    folder: Path,
    base: ModelFolder,
    adapter: Adapter,
    spec: LoRASpec,
    prepare: Callable[[str, torch.Tensor], torch.Tensor] = lambda name, weight: weight,
) -> None:
    """Writes a whole model: base weights with the adapter merged, and what belongs beside them.

    One tensor is held at a time; each keeps the base's type.

    Args:
        folder (Path): exists already.
        base (ModelFolder): the model; its files are only read.
        adapter (Adapter): by module.
        spec (LoRASpec): rank, alpha and kind.
        prepare (Callable): what the training did to a base weight before (QLoRA: NF4 and back), by name.
    """

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        weight = prepare(name, weight)
        update = adapter.get(name.removesuffix(".weight"))
        return weight if update is None else merged_weight(weight, update, spec)

    base.drop_tied_head(bool(base.config.get("tie_word_embeddings")))
    base.copy_companions(folder)
    base.rewrite(folder, change)


def merged(weights: Mapping[str, torch.Tensor], adapter: Adapter, spec: LoRASpec) -> dict[str, torch.Tensor]:
    """The weights that an adapter changes, merged, under Hugging Face's names."""
    return {f"{name}.weight": merged_weight(weights[f"{name}.weight"], u, spec) for name, u in adapter.items()}
