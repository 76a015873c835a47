"""LoRA and DoRA of a torchtune model: building, their start, their whole values, and sharding around them."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune import config, training
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.modules.peft import DoRALinear, LoRALinear

from pact_tune import sharded
from pact_tune.adapters import LoRASpec
from pact_tune.errors import UserError

NF4_BLOCK = 64 * 256  # weights that share one second-level scale; NF4 takes multiples of it only


def modules(model: nn.Module) -> dict[str, LoRALinear | DoRALinear]:
    """The model's LoRA or DoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear | DoRALinear)}


def build(cfg_model: DictConfig, world_size: int = 1, adapter_dtype: torch.dtype = torch.float32) -> nn.Module:
    """Builds a model, with adapters or without, on the current device and in the current dtype.

    Args:
        cfg_model (DictConfig): section `model` of the config.
        world_size (int): processes that will share it.
        adapter_dtype (torch.dtype): of LoRA's and DoRA's own weights.

    Returns:
        nn.Module: the model, its weights not yet loaded.

    Raises:
        UserError: it cannot be built, or its reference or export would not be right.
    """
    try:
        model = config.instantiate(cfg_model)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        hint = (
            f" (quantize_base takes weights in multiples of {NF4_BLOCK} only)" if cfg_model.get("quantize_base") else ""
        )
        raise UserError(f"Section 'model' cannot be built: {error}{hint}") from error
    _check(model, world_size)
    for layer in modules(model).values():
        _set_dtype(layer, adapter_dtype)
    return model


def _set_dtype(layer: LoRALinear | DoRALinear, dtype: torch.dtype) -> None:
    """Gives an adapter a dtype of its own: its input is cast to that, and the layer's result back to its input's.

    A step of 3e-5 on a weight of 0.01 is lost in bf16, whose numbers there lie 6e-5 apart. PEFT casts in the same places.
    """
    if layer.lora_a.weight.dtype is dtype:
        return
    for part in (layer.lora_a, layer.lora_b):
        part.to(dtype)
    if isinstance(layer, DoRALinear):
        layer.magnitude = nn.Parameter(layer.magnitude.to(dtype))
    layer.lora_a.register_forward_pre_hook(_cast_input)
    layer.register_forward_hook(_cast_result)


def _cast_input(module: nn.Linear, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return inputs[0].to(module.weight.dtype)


def _cast_result(module: nn.Module, inputs: tuple[torch.Tensor], result: torch.Tensor) -> torch.Tensor:
    return result.to(inputs[0].dtype)


def _check(model: nn.Module, world_size: int) -> None:
    if isinstance(model.norm, Gemma2FinalNorm):
        raise UserError(
            "torchtune's own gemma2 builders compute another network than Gemma 2 (they soft-cap the hidden state, not the "
            "logits): set model._component_: pact_tune.torchtune.from_checkpoint."
        )
    layers = modules(model)
    dora = [name for name, layer in layers.items() if isinstance(layer, DoRALinear)]
    if biased := [name for name in dora if layers[name].use_bias]:
        raise UserError(
            f"model.use_dora cannot be used on {biased[0]}, which has a bias: torchtune's DoRA scales the bias with the "
            "weight, which no merged checkpoint and no PEFT adapter can express; leave such layers out of "
            "lora_attn_modules (Qwen: q_proj, k_proj and v_proj), or set use_dora: False."
        )
    quantized = quantized_names(model)
    if dora and quantized and world_size > 1:
        raise UserError(
            "model.use_dora with quantize_base does not work on several processes (torchao cannot add to a sharded NF4 "
            "weight): use one process, or one of the two."
        )
    for name in quantized:
        numel = model.get_parameter(name).numel()
        if numel % (NF4_BLOCK * world_size):
            raise UserError(
                f"{name} has {numel} weights, which NF4 cannot divide among {world_size} process(es): it takes multiples of "
                f"{NF4_BLOCK} a process; use fewer processes, or quantize_base: False."
            )


def spec(model: nn.Module) -> LoRASpec:
    """Rank, alpha and kind of the model's adapter."""
    layer = next(iter(modules(model).values()))
    dora = isinstance(layer, DoRALinear)
    rank = layer.lora_a.out_features
    return LoRASpec(rank, layer.scaling * rank if dora else layer.alpha, dora)


def quantized_names(model: nn.Module) -> list[str]:
    """Names of the weights that are held in NF4; the model must not be sharded yet."""
    return [name for name, parameter in model.named_parameters() if isinstance(parameter, NF4Tensor)]


def _through_nf4(weight: torch.Tensor) -> torch.Tensor:
    return to_nf4(weight.contiguous()).get_original_weight()


def initial_adapter(model: nn.Module, base: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A fresh adapter: A Kaiming-uniform and B zero, as in torchtune, but from the seed alone.

    Args:
        model (nn.Module): with LoRA; may lie on the meta device.
        base (Mapping[str, torch.Tensor]): its base weights, whose row norms DoRA's magnitudes start from.
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
        if isinstance(layer, DoRALinear):
            weight = base[f"{name}.weight"].to(layer.weight.dtype)
            if layer._quantize_base:
                weight = _through_nf4(weight)
            adapter[f"{name}.magnitude"] = torch.linalg.norm(weight.to(dtype), dim=1)
    return adapter


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype, reshard_after_forward: bool) -> None:
    """Shards a model that lies on the meta device with FSDP2; its weights stay there until :func:`fill`.

    Args:
        model (nn.Module): on the meta device.
        device (torch.device): where its buffers go.
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
                rotary: Any = module
                rotary.rope_init()


def fill(
    model: nn.Module, base: Mapping[str, torch.Tensor], adapter: dict[str, torch.Tensor], device: torch.device
) -> None:
    """Loads a model's weights; every rank reads them itself and holds one whole tensor beside its shards.

    Args:
        model (nn.Module): on the device, or sharded and on the meta device.
        base (Mapping[str, torch.Tensor]): whole base weights by name, read one by one.
        adapter (dict[str, torch.Tensor]): whole adapter weights, on the CPU.
        device (torch.device): where the weights go.
    """
    shards = {}
    with torch.no_grad():
        for wrapped, parameter in model.named_parameters():
            name = unwrapped(wrapped)
            value = adapter[name] if name in adapter else base[name]
            if isinstance(parameter, DTensor):
                shards[name] = _shard_of(value.to(device, parameter.dtype), parameter)
            else:
                parameter.copy_(value.to(parameter.dtype))
    if shards:
        model.load_state_dict(shards, strict=True, assign=True)
        training.validate_no_params_on_meta_device(model)


def _shard_of(whole: torch.Tensor, like: DTensor) -> DTensor:
    """This rank's part of a whole tensor; nothing is sent."""
    if not isinstance(like._local_tensor, NF4Tensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    mesh, quantized = like.device_mesh, to_nf4(whole)
    part = quantized.chunk(mesh.size())[mesh.get_local_rank()]  # build() has made sure that the processes divide it
    local = quantized.new_zeros(part.size())
    local[: part.size(0)].copy_(part)  # a copy, so that the whole is freed
    return DTensor(local_tensor=local, spec=like._spec, requires_grad=False)  # from_local() takes no NF4


def load(model: nn.Module, trained: dict[str, torch.Tensor]) -> None:
    """Puts trained weights, from :func:`gather`, back into a model, in place."""
    sharded.restore(trained_parameters(model), trained)


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, whole and copied to the CPU, under the names of an unwrapped model; all ranks must call it."""
    return sharded.gather(trained_parameters(model))


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, sharded or not, under the names of an unwrapped model."""
    # Not from state_dict(), which would dequantise a QLoRA model's base weights on the way.
    return {unwrapped(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def unwrapped(name: str) -> str:
    """A parameter's name without what activation checkpointing and compilation put into it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
