"""Hugging Face checkpoints in and out of torchtune's naming: base weights, merged models and PEFT adapters."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.modules import TransformerDecoder

from pact_tune.adapters import (
    Adapter,
    Finish,
    LoRASpec,
    Update,
    check_fits,
    finished,
    merge_folder,
    peft_tensors,
    read_adapter,
    write_adapter,
)
from pact_tune.config import PathText
from pact_tune.errors import UserError, unknown_name
from pact_tune.families import Network, rope_scaling, rounded
from pact_tune.files import atomic_folder
from pact_tune.fingerprints import fingerprint
from pact_tune.stamp import STAMP_FILE, result_names, write_stamp
from pact_tune.torchtune import gemma2
from pact_tune.weights import ModelFolder, through_nf4

StateDict = dict[str, torch.Tensor]
MODEL_TYPES = {"QWEN2": "qwen2", "LLAMA3": "llama", "LLAMA3_2": "llama", "GEMMA2": "gemma2"}

# Hugging Face's names of modules -> torchtune's.
_MODULES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
}
_GEMMA2_MODULES = _MODULES | {
    "post_attention_layernorm": "sa_scale",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_scale",
}
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


class Names:
    """Names of parameters, from Hugging Face's to torchtune's and back.

    Args:
        family (str): key of :data:`pact_tune.families.FAMILIES`.
    """

    def __init__(self, family: str) -> None:
        self._to_tune = _GEMMA2_MODULES if family == "gemma2" else _MODULES
        self._to_hf = {tune: hf for hf, tune in self._to_tune.items()}

    def to_tune(self, name: str) -> str:
        """ "model.layers.0.self_attn.q_proj.weight" to "layers.0.attn.q_proj.weight"; KeyError for an unknown one."""
        module, kind = name.rsplit(".", 1)
        tune = self._module(module, self._to_tune, "layers.")
        return f"{tune}.scale" if "norm" in module else f"{tune}.{kind}"

    def to_hf(self, name: str) -> str:
        """The inverse of :meth:`to_tune`."""
        module, kind = name.rsplit(".", 1)
        return f"{self.module_to_hf(module)}.{'weight' if kind == 'scale' else kind}"

    def module_to_hf(self, module: str) -> str:
        """ "layers.0.attn.q_proj" to "model.layers.0.self_attn.q_proj"."""
        return self._module(module, self._to_hf, "model.layers.")

    @staticmethod
    def _module(module: str, names: Mapping[str, str], prefix: str) -> str:
        inner = _LAYER.fullmatch(module)
        return names[module] if inner is None else f"{prefix}{inner[1]}.{names[inner[2]]}"


class TorchtuneWeights(Mapping[str, torch.Tensor]):
    """A checkpoint's weights under torchtune's names and in its order of rows, read when they are asked for.

    Args:
        folder (ModelFolder): the checkpoint.

    Raises:
        UserError: weights that a plain model of this family does not have.
    """

    def __init__(self, folder: ModelFolder) -> None:
        self._folder, self._network = folder, folder.network
        names = Names(self._network.family)
        try:
            self._hf = {names.to_tune(name): name for name in folder}
        except (KeyError, ValueError) as error:
            raise UserError(
                f"The weights in '{folder.directory}' are not those of a plain {self._network.family} model ({error}): "
                "name an original checkpoint, not one that was quantised or otherwise changed."
            ) from error

    def __getitem__(self, name: str) -> torch.Tensor:
        """One whole tensor, on the CPU."""
        return self._network.interleave(name.rsplit(".", 1)[0], self._folder[self._hf[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._hf)

    def __len__(self) -> int:
        return len(self._hf)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; nothing is read."""
        return self._folder.shape(self._hf[name])


class HFCheckpointer:
    """Reads a Hugging Face checkpoint folder; writes merged checkpoints and PEFT adapters.

    Args:
        checkpoint_dir (str): folder with config.json and safetensors files.
        output_dir (str): where the recipe's results go.
        model_type (str | None): "QWEN2", "LLAMA3", "LLAMA3_2" or "GEMMA2", to be checked; None takes config.json's word.
        adapter (str | None): folder of a LoRA adapter that training goes on from; the reference does not contain it.
            (To make it part of the reference, merge it first: `pact merge`.)

    Raises:
        UserError: no checkpoint there, or one of another family.
    """

    def __init__(
        self,
        checkpoint_dir: PathText,
        output_dir: PathText,
        model_type: Literal["QWEN2", "LLAMA3", "LLAMA3_2", "GEMMA2"] | None = None,
        adapter: PathText | None = None,
    ) -> None:
        if model_type is not None and model_type not in MODEL_TYPES:
            raise unknown_name("value of checkpointer.model_type", model_type, MODEL_TYPES)
        self.folder = ModelFolder(checkpoint_dir)
        self.directory, self.config = self.folder.directory, self.folder.config
        self.output_dir = Path(output_dir)
        if model_type is not None and self.folder.model_type != MODEL_TYPES[model_type]:
            raise UserError(
                f"checkpointer.model_type is {model_type}, but '{checkpoint_dir}' holds a {self.folder.model_type} model: "
                "leave the key out, or name another checkpoint."
            )
        self.network = self.folder.network
        self.names = Names(self.network.family)
        self._start = None
        if adapter is not None:
            self._start = read_adapter(Path(adapter))
            check_fits(self._start[0], self.folder, adapter)
            self.adapter_directory = adapter

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self.network.vocab_size

    @property
    def weights_hash(self) -> str:
        """Which model this is, whatever its folder is called."""
        return self.folder.weights_hash

    def load(self) -> TorchtuneWeights:
        """The base weights under torchtune's names, to be read one by one."""
        return TorchtuneWeights(self.folder)

    def to_hf(self, weights: Mapping[str, torch.Tensor]) -> StateDict:
        """Weights under torchtune's names to Hugging Face's."""
        network = self.network
        return {
            self.names.to_hf(name): network.deinterleave(name.rsplit(".", 1)[0], tensor).contiguous()
            for name, tensor in weights.items()
        }

    def check(self, model: nn.Module) -> None:
        """Makes sure that a model builder makes the very network that the checkpoint is of; no weight is read.

        Args:
            model (nn.Module): as built; may lie on the meta device.

        Raises:
            UserError: names all tensors and constants that differ, the first ten at most.
        """
        weights = self.load()
        trained = re.compile(r"\.(lora_[ab]\.weight|magnitude)$")
        expected: dict[str, Any] = {
            name: tuple(parameter.shape) for name, parameter in model.named_parameters() if not trained.search(name)
        }
        found: dict[str, Any] = {name: weights.shape(name) for name in weights}
        # Shapes do not show these, and a wrong one trains a slightly wrong network without a word.
        found |= constants_of_network(self.network)
        expected |= constants_of_model(model)
        names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
        if names:
            listed = "; ".join(
                f"{name} is {found.get(name, 'missing')} in the checkpoint and {expected.get(name, 'missing')} in the model"
                for name in names[:10]
            )
            more = f"; and {len(names) - 10} more" if len(names) > 10 else ""
            raise UserError(
                f"The checkpoint in '{self.directory}' does not fit the model builder: {listed}{more}; set "
                "model._component_: pact_tune.torchtune.from_checkpoint, which reads them from the checkpoint."
            )

    def start(self, fresh: StateDict, spec: LoRASpec) -> StateDict:
        """The adapter that training starts from.

        Args:
            fresh (StateDict): the one that the seed gives, under torchtune's names.
            spec (LoRASpec): of the model in training.

        Returns:
            StateDict: ``fresh``, or the adapter of ``checkpointer.adapter``.

        Raises:
            UserError: that adapter has another rank, alpha or kind, or lies on other layers.
        """
        if self._start is None:
            return fresh
        adapter, found = self._start
        if found != spec:
            raise UserError(
                f"The adapter in '{self.adapter_directory}' has {found._asdict()}, the config {spec._asdict()}: set "
                f"model.lora_rank={found.rank} model.lora_alpha={found.alpha:g} model.use_dora={found.dora}."
            )
        given = self._adapter_to_tune(adapter)
        if given.keys() != fresh.keys():
            other = sorted(given.keys() ^ fresh.keys())[0]
            raise UserError(
                f"The adapter in '{self.adapter_directory}' lies on other layers than the config's ({other}): set "
                "model.lora_attn_modules, apply_lora_to_mlp and apply_lora_to_output as it was trained."
            )
        return {name: tensor.to(fresh[name].dtype) for name, tensor in given.items()}

    def _adapter_to_tune(self, adapter: Adapter) -> StateDict:
        tensors: StateDict = {}
        for module, update in adapter.items():
            name = self.names.to_tune(f"{module}.weight").removesuffix(".weight")
            tensors[f"{name}.lora_a.weight"] = update.a
            tensors[f"{name}.lora_b.weight"] = self.network.interleave(module, update.b)
            if update.magnitude is not None:
                tensors[f"{name}.magnitude"] = self.network.interleave(module, update.magnitude)
        return tensors

    def adapter_to_hf(self, trained: StateDict) -> Adapter:
        """A trained adapter by module, under Hugging Face's names.

        The rows of B belong to the rows of the base weight, so whatever the order of those is, B has it, and DoRA's
        magnitudes; A is left as it is. torchtune's own exporter permutes for every family, and no magnitudes.

        Args:
            trained (StateDict): "....lora_a.weight", "....lora_b.weight" and, for DoRA, "....magnitude" of each module.

        Returns:
            Adapter: by module.
        """
        adapter: Adapter = {}
        for key, a in trained.items():
            if key.endswith(".lora_a.weight"):
                module = key.removesuffix(".lora_a.weight")
                b, magnitude = trained[f"{module}.lora_b.weight"], trained.get(f"{module}.magnitude")
                adapter[self.names.module_to_hf(module)] = Update(
                    a,
                    self.network.deinterleave(module, b),
                    None if magnitude is None else self.network.deinterleave(module, magnitude),
                )
        return adapter

    def save(
        self,
        name: str,
        trained: StateDict,
        spec: LoRASpec | None,
        stamp: dict[str, Any],
        quantized: Sequence[str] = (),
        dtype: torch.dtype = torch.float32,
        merge: bool = True,
        finish: Finish | None = None,
    ) -> Path:
        """Writes one result folder: a whole checkpoint, ``adapter/`` where there is one, pact.json.

        Args:
            name (str): folder below ``output_dir``.
            trained (StateDict): what was trained, whole, under torchtune's names; it is not changed.
            spec (LoRASpec | None): rank, alpha and kind of the adapter; None in full fine-tuning.
            stamp (dict[str, Any]): how the model was made; goes to pact.json.
            quantized (Sequence[str]): weights that the model held in NF4, under torchtune's names.
            dtype (torch.dtype): of the model in training.
            merge (bool): write base weights with the adapter merged, in the base's dtype; False: the adapter alone.
            finish (Finish | None): an objective's last word on (A, B) of each module, under Hugging Face's names.

        Returns:
            Path: the folder; it appears whole or not at all.
        """
        directory = self.output_dir / name
        hf_quantized = sorted(map(self.names.to_hf, quantized))
        stamp = {**stamp, "base": str(self.directory.resolve())}

        def prepare(weight_name: str, weight: torch.Tensor) -> torch.Tensor:
            if weight_name not in hf_quantized:
                return weight
            return through_nf4(weight, weight_name.removesuffix(".weight"), self.network, dtype)

        with atomic_folder(directory, STAMP_FILE, result_names(directory)) as folder:
            if spec is None:
                weights = self.to_hf(trained)
                save_torch_state_dict(weights, folder)
                self.folder.copy_companions(folder)
                stamp |= {"adapter": None, "weights": fingerprint(weights)}
            else:
                adapter = finished(self.adapter_to_hf(trained), finish)
                stamp |= {"adapter": {**spec._asdict(), "fingerprint": fingerprint(peft_tensors(adapter))}}
                stamp["nf4"] = hf_quantized
                # In a folder of its own: transformers would otherwise load the adapter, not the weights beside it.
                (folder / "adapter").mkdir()
                write_adapter(folder / "adapter", adapter, spec, self.directory)
                write_stamp(folder / "adapter", stamp)  # adapters are often published alone
                if merge:
                    merge_folder(folder, self.folder, adapter, spec, prepare)
            write_stamp(folder, stamp)
        return directory


def constants_of_network(network: Network) -> dict[str, Any]:
    """What a checkpoint says of its network beyond the shapes of its weights, under config.json's names."""
    constants: dict[str, Any] = {
        "rms_norm_eps": network.norm_eps,
        "rope_theta": network.rope_base,
        "rope_scaling": network.rope_scaling,
        "num_attention_heads": network.num_heads,
        "num_key_value_heads": network.num_kv_heads,
    }
    if network.family == "gemma2":
        constants |= {
            "query_pre_attn_scalar": network.query_scalar,
            "attn_logit_softcapping": network.attention_cap,
            "final_logit_softcapping": network.final_cap,
            "sliding_window": list(network.sliding_windows or ()),
        }
    return constants


def constants_of_model(model: TransformerDecoder) -> dict[str, Any]:
    """The same of a torchtune model.

    Args:
        model (TransformerDecoder): may lie on the meta device.

    Returns:
        dict[str, Any]: under config.json's names.
    """
    attention = model.layers[0].attn
    rope = attention.pos_embeddings
    scaled = isinstance(rope, Llama3ScaledRoPE)
    constants: dict[str, Any] = {
        "rms_norm_eps": rounded(model.norm.eps),
        "rope_theta": float(rope.base),
        "rope_scaling": (
            rope_scaling((rope.scale_factor, rope.low_freq_factor, rope.high_freq_factor, rope.old_context_len))
            if scaled
            else None
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
