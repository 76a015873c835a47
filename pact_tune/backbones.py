"""Which library computes a run's network: `model._component_` says it."""

from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedTokenizerBase

from pact_tune.adapters import Finish
from pact_tune.decoder import Decoder
from pact_tune.objectives.base import Context

TRANSFORMERS = "pact_tune.hf.causal_lm"  # everything else builds a torchtune model


class Backbone(Protocol):
    """What the recipe must know of a network; no weight is read before :meth:`load`.

    Attributes:
        vocab_size (int): rows of the output head.
        hidden_size (int): H.
        max_seq_len (int): longest row, in tokens.
        has_adapters (bool): False: all weights are trained.
        reference (dict[str, Any]): all that the frozen network's numbers depend on beside dtype.
        stamp (dict[str, Any]): which reference a result was trained against.
        weight_bytes (int): of the checkpoint, and of a merged one.
        model (nn.Module): after :meth:`load`.
        decoder (Decoder): after :meth:`load`.
    """

    vocab_size: int
    hidden_size: int
    max_seq_len: int
    has_adapters: bool
    model: nn.Module

    @property
    def decoder(self) -> Decoder: ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def reference(self) -> dict[str, Any]: ...

    @property
    def stamp(self) -> dict[str, Any]: ...

    def context(self, tokenizer: PreTrainedTokenizerBase) -> Context: ...

    def load(self, tokenizer: PreTrainedTokenizerBase, trained: dict[str, torch.Tensor] | None, seed: int) -> None: ...

    def trained(self) -> dict[str, nn.Parameter]: ...

    def gather(self) -> dict[str, torch.Tensor]: ...

    def restore(self, trained: dict[str, torch.Tensor]) -> None: ...

    def save(
        self,
        name: str,
        trained: dict[str, torch.Tensor],
        stamp: dict[str, Any],
        *,
        adapter_only: bool,
        finish: Finish | None,
    ) -> Path: ...


def open_backbone(cfg: DictConfig, device: torch.device, dtype: torch.dtype, world_size: int) -> Backbone:
    """The backbone that a complete config asks for.

    Args:
        cfg (DictConfig): complete.
        device (torch.device): where it is trained.
        dtype (torch.dtype): of the frozen weights.
        world_size (int): processes that share it.

    Returns:
        Backbone: nothing but configuration is read yet.

    Raises:
        UserError: no such checkpoint, or settings that cannot be used with it.
    """
    # Here: either takes seconds to import, and a run needs one.
    if cfg.model._component_ == TRANSFORMERS:
        from pact_tune.hf.backbone import HFBackbone

        return HFBackbone(cfg, device, dtype, world_size)
    from pact_tune.torchtune.backbone import TorchtuneBackbone

    return TorchtuneBackbone(cfg, device, dtype, world_size)
