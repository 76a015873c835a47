"""A torchtune model of a Hugging Face checkpoint, as the recipe trains it: opened, loaded, gathered, saved."""

import functools
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune import config, modules, training, utils
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from transformers import PreTrainedTokenizerBase

from pact_tune.adapters import Finish
from pact_tune.errors import UserError
from pact_tune.generation import device_here
from pact_tune.objectives.base import Context
from pact_tune.torchtune import lora
from pact_tune.torchtune.checkpoint import constants_of_model
from pact_tune.torchtune.decoder import TorchtuneDecoder


def device_and_dtype(cfg: DictConfig) -> tuple[torch.device, torch.dtype]:
    """What the config's ``device`` and ``dtype`` are here.

    Raises:
        UserError: not to be had here, or not supported.
    """
    wanted = device_here(cfg.device)
    device = utils.get_device(wanted)
    if device.type != torch.device(wanted).type:  # torchtune falls back to the CPU without a word
        raise UserError(
            f"device: {wanted} is not available here: set device: {device.type} (device={device.type} on the command line)."
        )
    try:
        dtype = training.get_dtype(cfg.dtype, device=device)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"dtype: {cfg.dtype} cannot be used here: {error}") from error
    return device, dtype


Trained = dict[str, torch.Tensor]  # what is trained, whole, on the CPU, under the backbone's own names


class TorchtuneBackbone:
    """What the recipe must know of a network; no weight is read before :meth:`load`.

    Args:
        cfg (DictConfig): the complete config.
        device (torch.device): where it is trained.
        dtype (torch.dtype): of the frozen weights.
        world_size (int): processes that share it.

    Raises:
        UserError: no such checkpoint, or a builder that cannot be used.
    """

    def __init__(self, cfg: DictConfig, device: torch.device, dtype: torch.dtype, world_size: int) -> None:
        self.cfg, self.device, self.dtype, self.world_size = cfg, device, dtype, world_size
        self.adapter_dtype = training.get_dtype(cfg.adapter_dtype, device=device)
        self.checkpointer = config.instantiate(cfg.checkpointer)
        with training.set_default_dtype(dtype), torch.device("meta"):
            plan: Any = lora.build(cfg.model, world_size, self.adapter_dtype)
        self.checkpointer.check(plan)
        self.max_seq_len: int = plan.max_seq_len
        self.hidden_size: int = plan.tok_embeddings.embedding_dim
        self.vocab_size: int = self.checkpointer.vocab_size
        self.adapted = {name: self.checkpointer.names.module_to_hf(name) for name in lora.modules(plan)}
        self.has_adapters = bool(self.adapted)
        self.quantized = lora.quantized_names(plan)
        self._constants = constants_of_model(plan)

    @functools.cached_property
    def reference(self) -> dict[str, Any]:
        """All that the frozen network's numbers depend on beside dtype; JSON-serialisable."""
        return {
            "backbone": "torchtune",
            "weights": self.checkpointer.weights_hash,
            "network": self._constants,
            "quantized": self.quantized,
        }

    @property
    def weight_bytes(self) -> int:
        """Size of a whole checkpoint."""
        return sum(file.stat().st_size for file in self.checkpointer.folder.files)

    @property
    def stamp(self) -> dict[str, Any]:
        """Which reference a result was trained against; with QLoRA the quantised base, by torchtune's names."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"fingerprint": self.reference["weights"], "dtype": dtype, "quantized": self.quantized}

    def context(self, tokenizer: PreTrainedTokenizerBase) -> Context:
        """What an objective may look at; no weights are loaded for it."""
        own_rows = self.checkpointer.network.interleave
        folder, known = self.checkpointer.folder, self.reference["weights"]
        return Context(tokenizer, self.vocab_size, self.device, known, folder, self.adapted, own_rows)

    def load(self, tokenizer: PreTrainedTokenizerBase, trained: Trained | None, seed: int) -> None:
        """Builds the network, with the base weights from the checkpoint; afterwards there are ``model`` and ``decoder``.

        Args:
            tokenizer (PreTrainedTokenizerBase): of the run.
            trained (Trained | None): the adapter of the run to resume; None: a fresh one.
            seed (int): of the fresh adapter.

        Raises:
            UserError: damaged weights, or those of another network than the builder's.
        """
        cfg, distributed = self.cfg, self.world_size > 1
        with training.set_default_dtype(self.dtype), torch.device("meta" if distributed else self.device):
            model = lora.build(cfg.model, self.world_size, self.adapter_dtype)
        base = self.checkpointer.load()
        adapter: dict[str, torch.Tensor] = {}
        if self.has_adapters:
            set_trainable_params(model, get_adapter_params(model))
            fresh = lora.initial_adapter(model, base, seed)
            adapter = trained or self.checkpointer.start(fresh, lora.spec(model))
        if cfg.compile:
            training.compile_model(model, verbose=False)
        if cfg.enable_activation_checkpointing:
            training.set_activation_checkpointing(model, auto_wrap_policy={modules.TransformerSelfAttentionLayer})
        if distributed:
            lora.shard(model, self.device, self.dtype, cfg.fsdp_reshard_after_forward)
        lora.fill(model, base, adapter, self.device)
        self.model = model
        self.decoder = TorchtuneDecoder(model, tokenizer.pad_token_id, self.device)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, sharded or not, under the backbone's own names."""
        return lora.trained_parameters(self.model)

    def gather(self) -> Trained:
        """What is trained, whole; all ranks must call it."""
        return lora.gather(self.model)

    def restore(self, trained: Trained) -> None:
        """Puts trained weights back, in place."""
        lora.load(self.model, trained)

    def save(
        self,
        name: str,
        trained: Trained,
        stamp: dict[str, Any],
        *,
        adapter_only: bool,
        finish: Finish | None,
    ) -> Path:
        """Writes one result; rank 0 alone calls it.

        Args:
            name (str): folder below the run's output folder.
            trained (Trained): from :meth:`gather`.
            stamp (dict[str, Any]): how it was made.
            adapter_only (bool): no merged checkpoint.
            finish (Finish | None): an objective's last word on the adapter.

        Returns:
            Path: the folder.
        """
        return self.checkpointer.save(
            name,
            trained,
            lora.spec(self.model) if self.has_adapters else None,
            stamp,
            quantized=self.quantized,
            dtype=self.dtype,
            merge=not adapter_only,
            finish=finish,
        )
