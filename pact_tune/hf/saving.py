"""Results of a transformers model: a PEFT adapter, a merged checkpoint, trained weights; for the recipe and the trainers."""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pact_tune.adapters import WEIGHTS, Adapter, LoRASpec, merge_folder, peft_tensors
from pact_tune.fingerprints import fingerprint
from pact_tune.weights import ModelFolder


def save_adapter(folder: Path, adapter: Adapter, spec: LoRASpec, config: LoraConfig, base: Path) -> dict[str, Any]:
    """Writes an adapter as PEFT reads it, with PEFT's own settings of it.

    Args:
        folder (Path): is made.
        adapter (Adapter): by module.
        spec (LoRASpec): rank, alpha and kind.
        config (LoraConfig): of the model in training.
        base (Path): folder of the model that it belongs on.

    Returns:
        dict[str, Any]: for the stamp.
    """
    folder.mkdir()
    save_file(peft_tensors(adapter), folder / WEIGHTS, metadata={"format": "pt"})
    config = copy(config)
    config.inference_mode, config.base_model_name_or_path = True, str(base.resolve())
    config.save_pretrained(str(folder))
    return {"adapter": {**spec._asdict(), "fingerprint": fingerprint(peft_tensors(adapter))}}


def save_merged(folder: Path, base: ModelFolder, adapter: Adapter, spec: LoRASpec, names: dict[str, str]) -> None:
    """Writes a whole checkpoint with an adapter merged, under the base checkpoint's names and in its types.

    Args:
        folder (Path): exists already.
        base (ModelFolder): the model; its files are only read.
        adapter (Adapter): by module.
        spec (LoRASpec): rank, alpha and kind.
        names (dict[str, str]): modules that the checkpoint calls otherwise.
    """
    merge_folder(folder, base, {names.get(module, module): update for module, update in adapter.items()}, spec)


def save_weights(
    folder: Path, base: ModelFolder, skeleton: PreTrainedModel, weights: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Writes a whole checkpoint of trained weights, by transformers' own writer, which knows how it names them in files.

    Args:
        folder (Path): exists already.
        base (ModelFolder): the model that they were trained from; tokenizer and licence are copied from it.
        skeleton (PreTrainedModel): the model on the meta device.
        weights (dict[str, torch.Tensor]): all of them, by the names of its parameters.

    Returns:
        dict[str, Any]: for the stamp.
    """
    buffers = {name: tensor for name, tensor in skeleton.state_dict().items() if not tensor.is_meta}
    skeleton.save_pretrained(folder, state_dict={**buffers, **weights})
    base.copy_companions(folder)
    written = ModelFolder(folder, "the result")
    return {"adapter": None, "weights": fingerprint(dict(written))}
