"""A term of the trained weights themselves, added to the gradients once an optimiser step."""

import re
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def add_penalty(
    parameters: Iterable[tuple[str, nn.Parameter]], penalty: Callable[[str, dict[str, torch.Tensor]], torch.Tensor]
) -> torch.Tensor:
    """Adds the gradient of a penalty; one module's weights are whole at a time, on every rank alike.

    Args:
        parameters (Iterable[tuple[str, nn.Parameter]]): what is trained, sharded or not; all ranks in the same order.
        penalty (Callable): maps (module name, its trained weights by their last names, such as "lora_a.weight", whole) to a
            scalar.

    Returns:
        torch.Tensor: the sum over modules, a scalar without a gradient.
    """
    modules: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters:
        module, leaf = _split(name)
        modules.setdefault(module, {})[leaf] = parameter
    total = torch.zeros(())
    for module, trained in modules.items():
        whole = {leaf: _whole(parameter).requires_grad_() for leaf, parameter in trained.items()}
        value = penalty(module, whole)
        gradients = torch.autograd.grad(value, list(whole.values()), allow_unused=True)
        for parameter, gradient in zip(trained.values(), gradients, strict=True):
            if gradient is None:
                continue
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        total = total + value.detach().to(total.device)
    return total


def _split(name: str) -> tuple[str, str]:
    """Module and last name of a parameter; an adapter's weights belong to the module that they adapt."""
    module, *leaf = re.split(r"\.(?=lora_|magnitude)", name, maxsplit=1)
    if not leaf:
        module, _, last = name.rpartition(".")
        leaf = [last]
    return module, leaf[0]


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    tensor = parameter.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
