"""Whole values of trained parameters, whether FSDP2 shards them or not."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def gather(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Parameters whole and copied to the CPU; all ranks must call it.

    Args:
        parameters (Mapping[str, nn.Parameter]): sharded or not.

    Returns:
        dict[str, torch.Tensor]: by name.
    """
    tensors = {name: parameter.detach() for name, parameter in parameters.items()}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    return {name: tensor.cpu().clone() for name, tensor in whole.items()}


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Puts whole values back in place, so that an optimizer keeps its parameters.

    Args:
        parameters (Mapping[str, nn.Parameter]): sharded or not.
        values (Mapping[str, torch.Tensor]): from :func:`gather`.
    """
    for name, parameter in parameters.items():
        value = values[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)
