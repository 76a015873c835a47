"""LoRA parameters of a torchtune model: their start, their whole values, and how the model is sharded around them."""

import functools
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchtune import training
from torchtune.modules.peft import DoRALinear, LoRALinear

from pact_tune.errors import UserError


def modules(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def check(model: nn.Module) -> None:
    """Raises UserError when the model has no LoRA, or a kind of it whose reference or export would not be right."""
    if any(isinstance(module, DoRALinear) for module in model.modules()):
        raise UserError(
            "model.use_dora is not supported: torchtune's DoRA cannot be exported without changing the model."
        )
    layers = modules(model)
    if not layers:
        raise UserError(
            "The model has no LoRA layers: name a lora_* builder, and lora_attn_modules that are not empty."
        )
    if any(layer._quantize_base for layer in layers.values()):
        raise UserError("model.quantize_base is not supported yet: use a builder without QLoRA.")
    if any(layer.rank < 1 for layer in layers.values()):
        raise UserError("model.lora_rank must be at least 1.")


def rank_and_alpha(model: nn.Module) -> tuple[int, float]:
    """r and alpha, which torchtune sets alike for all layers."""
    layer = next(iter(modules(model).values()))
    return layer.rank, layer.alpha


def initial_adapter(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A fresh adapter: A Kaiming-uniform, B zero, as in torchtune, but from the seed alone.

    Args:
        model (nn.Module): with LoRA; may lie on the meta device.
        seed (int): equal seeds give equal adapters, whatever the number of processes.

    Returns:
        dict[str, torch.Tensor]: whole tensors on the CPU, under the model's parameter names.
    """
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, layer in modules(model).items():
        a = torch.empty(layer.lora_a.weight.shape)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        dtype = layer.lora_a.weight.dtype
        adapter[f"{name}.lora_a.weight"] = a.to(dtype)
        adapter[f"{name}.lora_b.weight"] = torch.zeros(layer.lora_b.weight.shape, dtype=dtype)
    return adapter


def shard(
    model: nn.Module,
    base: dict[str, torch.Tensor],
    adapter: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    reshard_after_forward: bool,
) -> None:
    """Shards a model that lies on the meta device with FSDP2 and loads it.

    Args:
        model (nn.Module): on the meta device.
        base (dict[str, torch.Tensor]): whole base weights, on the CPU.
        adapter (dict[str, torch.Tensor]): whole adapter weights, on the CPU.
        device (torch.device): where the shards go.
        dtype (torch.dtype): of buffers such as the rotary tables' inputs.
        reshard_after_forward (bool): free each layer's whole weights after its forward.
    """
    conditions = [functools.partial(training.get_shard_conditions, names_to_match=None)]
    training.shard_model(
        model, shard_conditions=conditions, cpu_offload=False, reshard_after_forward=reshard_after_forward
    )
    with training.set_default_dtype(dtype), device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    training.load_from_full_model_state_dict(model, base | adapter, device, strict=True)
    training.validate_no_params_on_meta_device(model)


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights, whole and copied to the CPU, under the names of an unwrapped model; all ranks must call it."""
    adapter = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in adapter.items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in whole.items()}
