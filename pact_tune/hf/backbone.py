"""A transformers model as the recipe trains it: opened, loaded, sharded, gathered, saved."""

import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pact_tune import sharded
from pact_tune.adapters import Finish, finished
from pact_tune.errors import UserError
from pact_tune.files import atomic_folder
from pact_tune.hf.decoder import HFDecoder, setting
from pact_tune.hf.model import CausalLM, adapter_of, causal_lm, checkpoint_names, trained_parameters
from pact_tune.hf.saving import save_adapter, save_merged, save_weights
from pact_tune.log import logger
from pact_tune.memory import Sizes
from pact_tune.objectives.base import Context
from pact_tune.stamp import STAMP_FILE, result_names, write_stamp

Trained = dict[str, torch.Tensor]  # what is trained, whole, on the CPU, under the backbone's own names
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def plan(cfg: DictConfig) -> tuple[CausalLM, PreTrainedModel]:
    """The model of a complete config on the meta device; what is trained has ``requires_grad``.

    Raises:
        UserError: it cannot be built.
    """
    section: Any = OmegaConf.to_container(cfg.model, resolve=True)
    spec = causal_lm(**{key: value for key, value in section.items() if key != "_component_"})
    return spec, spec.skeleton(DTYPES[cfg.dtype], DTYPES[cfg.adapter_dtype])


class HFBackbone:
    """What the recipe must know of a network; no weight is read before :meth:`load`.

    Args:
        cfg (DictConfig): the complete config.
        device (torch.device): where it is trained.
        dtype (torch.dtype): of the frozen weights.
        world_size (int): processes that share it.

    Raises:
        UserError: no such checkpoint, or settings that do not go together.
    """

    def __init__(self, cfg: DictConfig, device: torch.device, dtype: torch.dtype, world_size: int) -> None:
        self.cfg, self.device, self.dtype, self.world_size = cfg, device, dtype, world_size
        self.spec, skeleton = plan(cfg)
        self.folder = self.spec.folder
        self.names = checkpoint_names(skeleton, dict.fromkeys(self.folder))
        self.has_adapters = self.spec.r is not None
        modules = [
            n.removesuffix(".lora_a.weight") for n in trained_parameters(skeleton) if n.endswith(".lora_a.weight")
        ]
        self.adapted = {module: self.names.get(module, module) for module in modules}
        self._check()
        text = self.spec.text_config
        limit: int | None = getattr(text, "max_position_embeddings", None)  # none with ALiBi or recurrent layers
        self.max_seq_len: int = self.spec.max_seq_len or limit or sys.maxsize
        self.hidden_size: int = text.hidden_size
        self.vocab_size: int = text.vocab_size

    def _check(self) -> None:
        spec = self.spec
        if spec.load_in_4bit and self.world_size > 1:
            raise UserError("model.load_in_4bit was never run on several processes: use one, or set it to False.")
        if spec.load_in_4bit and not self.cfg.save_adapter_weights_only:
            raise UserError(
                "With model.load_in_4bit the adapter belongs on weights that only bitsandbytes can compute with: set "
                "save_adapter_weights_only: True."
            )
        for module, name in self.adapted.items():
            if f"{name}.weight" not in self.folder:
                raise UserError(
                    f"model.target_modules names {module}, whose weight transformers puts together from several of the "
                    "checkpoint's: such layers take no adapter here; name others."
                )
        spec.check_adapter(self.names)

    @functools.cached_property
    def reference(self) -> dict[str, Any]:
        """All that the frozen network's numbers depend on beside dtype; JSON-serialisable."""
        return {
            "backbone": "transformers",
            "weights": self.folder.weights_hash,
            "attention": self.spec.attention,
            "quantized": "bitsandbytes NF4" if self.spec.load_in_4bit else [],
        }

    @property
    def stamp(self) -> dict[str, Any]:
        """Which reference a result was trained against."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"fingerprint": self.reference["weights"], "dtype": dtype, "quantized": self.reference["quantized"]}

    def context(self, tokenizer: PreTrainedTokenizerBase) -> Context:
        """What an objective may look at; no weights are loaded for it."""
        known = self.reference["weights"]
        return Context(tokenizer, self.vocab_size, self.device, known, self.folder, self.adapted)

    @property
    def weight_bytes(self) -> int:
        """Of the checkpoint, and of a merged one."""
        return sum(file.stat().st_size for file in self.folder.files)

    def load(self, tokenizer: PreTrainedTokenizerBase, trained: Trained | None, seed: int) -> None:
        """Loads the network; afterwards there are ``model`` and ``decoder``.

        With several processes rank 0 alone holds all weights, on its CPU, and hands them out layer by layer.

        Args:
            tokenizer (PreTrainedTokenizerBase): of the run.
            trained (Trained | None): the adapter of the run to resume; None: a fresh one.
            seed (int): of the fresh adapter.

        Raises:
            UserError: damaged weights, a head that is not reproduced, or rows that are not kept apart.
        """
        cfg, rank = self.cfg, dist.get_rank() if self.world_size > 1 else 0
        adapter_dtype = DTYPES[cfg.adapter_dtype]
        source: Any = None
        if rank == 0:
            source = self.spec.load(self.dtype, adapter_dtype, seed, self.device)
        if self.world_size > 1:
            model = self.spec.skeleton(self.dtype, adapter_dtype)
            shard(model, source, self.device, cfg.fsdp_reshard_after_forward)
        else:
            assert source is not None
            model = source if self.spec.load_in_4bit else source.to(self.device)
        self.model = model.train()
        if trained is not None and self.has_adapters:
            self.restore(trained)
        if cfg.enable_activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if cfg.compile:
            for layer in layers(model):
                layer.compile()
        self.decoder = HFDecoder(model, tokenizer.pad_token_id, self.device)
        self.decoder.check(cfg.packed)

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, sharded or not, under the backbone's own names."""
        return trained_parameters(self.model)

    def gather(self) -> Trained:
        """What is trained, whole; all ranks must call it."""
        return sharded.gather(self.trained())

    def restore(self, trained: Trained) -> None:
        """Puts trained weights back, in place."""
        sharded.restore(self.trained(), trained)

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
            Path: the folder; it appears whole or not at all.
        """
        directory = Path(self.cfg.output_dir) / name
        stamp = {**stamp, "base": str(self.folder.directory.resolve()), "renamed": self.names}
        with atomic_folder(directory, STAMP_FILE, result_names(directory)) as folder:
            if self.has_adapters:
                adapter = finished(adapter_of(trained), finish)
                (config,) = self.model.peft_config.values()
                # In a folder of its own: transformers would otherwise load the adapter, not the weights beside it.
                stamp |= save_adapter(folder / "adapter", adapter, self.spec.spec, config, self.folder.directory)
                write_stamp(folder / "adapter", stamp)  # adapters are often published alone
                if not adapter_only:
                    save_merged(folder, self.folder, adapter, self.spec.spec, self.names)
            else:
                stamp |= save_weights(folder, self.folder, self.spec.skeleton(self.dtype), trained)
            write_stamp(folder, stamp)
        return directory


INNER = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")  # what configs call the feed-forward's width


def transformers_sizes(model: PreTrainedModel) -> Sizes:
    """What the estimate of memory needs to know of a model on the meta device."""
    config, all_layers = model.config.get_text_config(), layers(model)

    def size(parameters: Iterable[nn.Parameter]) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)

    embeddings: Any = model.get_input_embeddings()
    inner = setting(config, INNER) or 4 * config.hidden_size
    if (experts := getattr(config, "num_experts_per_tok", None)) is not None:
        inner = experts * getattr(config, "moe_intermediate_size", inner)
    return Sizes(
        weights=size(model.parameters()),
        trained=size(parameter for parameter in model.parameters() if parameter.requires_grad),
        layers=len(all_layers),
        layer=max(size(layer.parameters()) for layer in all_layers),
        embedding=embeddings.weight,
        inner=inner,
        whole_scores=getattr(config, "num_attention_heads", 0) if model.config._attn_implementation == "eager" else 0,
    )


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """The model's decoder layers: what transformers never splits between devices."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def shard(
    model: PreTrainedModel, source: PreTrainedModel | None, device: torch.device, reshard_after_forward: bool
) -> None:
    """Shards a model with FSDP2, layer by layer, each getting its weights just before.

    So no process holds more than one whole layer beside its shards, and what lies on the meta device is replaced before
    anything computes with it: rotary tables and Gemma's scale of embeddings, which no checkpoint holds, come from rank 0 too.

    Args:
        model (PreTrainedModel): on the meta device.
        source (PreTrainedModel | None): the same with its weights; on rank 0 alone.
        device (torch.device): where the shards go.
        reshard_after_forward (bool): free each layer's whole weights after its forward.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    names = {module: name for name, module in model.named_modules()}
    for layer in layers(model):
        _materialize(layer, source.get_submodule(names[layer]) if source is not None else None, device)
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard_after_forward)
    _materialize(model, source, device)
    model.tie_weights()
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)
    if all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        logger.info(f"{mesh.size()} processes: parameters are sharded (FSDP2)")


@torch.no_grad()
def _materialize(module: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Gives every tensor of a module that lies on the meta device rank 0's value."""
    sources = dict(source.named_modules()) if source is not None else {}
    for name, part in module.named_modules():
        own = sources.get(name)
        for tensors, originals in (
            (part._parameters, own._parameters if own is not None else {}),
            (part._buffers, own._buffers if own is not None else {}),
        ):
            for key, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                value = torch.empty_like(tensor, device=device, requires_grad=False)
                if own is not None:
                    value.copy_(originals[key])
                dist.broadcast(value, src=0)
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[key] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
        if lost := [key for key, value in vars(part).items() if isinstance(value, torch.Tensor) and value.is_meta]:
            raise UserError(
                f"{type(part).__name__}.{lost[0]} cannot be carried to several processes (neither weight nor buffer): use one."
            )
