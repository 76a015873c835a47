"""The recipe's section `model` for any causal language model of transformers, with PEFT's LoRA or without."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from pact_tune.adapters import Adapter, LoRASpec, Update, check_fits, read_adapter
from pact_tune.config import Dropout, PathText, Positive, Size, Text
from pact_tune.errors import UserError, one_line
from pact_tune.families import published_config
from pact_tune.weights import ModelFolder

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


def causal_lm(
    path: PathText,
    r: Annotated[int, Field(ge=1, le=65_536)] | None = None,
    lora_alpha: Positive = 16,
    target_modules: list[Text] | Text = "all-linear",
    lora_dropout: Dropout = 0.0,
    use_dora: bool = False,
    load_in_4bit: bool = False,
    adapter: PathText | None = None,
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None,
    max_seq_len: Size | None = None,
) -> "CausalLM":
    """A causal language model of transformers; its weights are not yet loaded.

    Names are PEFT's. Without ``r`` all weights are trained.

    Args:
        path (str): folder of a Hugging Face checkpoint.
        r (int | None): rank of LoRA; None: full fine-tuning.
        lora_alpha (float): LoRA is scaled by alpha / r.
        target_modules (list[str] | str): last names of the modules with LoRA, a regular expression of whole names, or
            "all-linear": every linear layer but the head; of a mixture of experts, those of the attention.
        lora_dropout (float): on LoRA's input.
        use_dora (bool): DoRA instead of LoRA.
        load_in_4bit (bool): the frozen weights in NF4, by bitsandbytes; on one process, and exported as an adapter only.
        adapter (str | None): folder of an adapter that training goes on from; the reference does not contain it.
        attn_implementation (str | None): of transformers; None: "sdpa", or "eager" where the architecture has no sdpa
            (gpt-oss) or soft-caps its scores (Gemma 2).
        max_seq_len (int | None): longest row in tokens; None is what config.json says.

    Returns:
        CausalLM: what builds it.

    Raises:
        UserError: settings that contradict each other.
    """
    if r is None and (use_dora or load_in_4bit or adapter):
        raise UserError("model.use_dora, load_in_4bit and adapter need an adapter to train: set model.r.")
    targets = target_modules if isinstance(target_modules, str) else tuple(target_modules)
    return CausalLM(
        path, r, lora_alpha, targets, lora_dropout, use_dora, load_in_4bit, adapter, attn_implementation, max_seq_len
    )


@dataclass(frozen=True)
class CausalLM:
    """See :func:`causal_lm`."""

    path: str
    r: int | None
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    lora_dropout: float
    use_dora: bool
    load_in_4bit: bool
    adapter: str | None
    attn_implementation: str | None
    max_seq_len: int | None

    @functools.cached_property
    def folder(self) -> ModelFolder:
        """The checkpoint; UserError where there is none."""
        return ModelFolder(self.path, "model.path")

    @functools.cached_property
    def config(self) -> PretrainedConfig:
        """What config.json says; of a published model where the folder is not there yet.

        Raises:
            UserError: no checkpoint there, or of a kind that transformers does not know.
        """
        published = None if (Path(self.path) / "config.json").is_file() else published_config(self.path)
        if published is not None:
            fields = {key: value for key, value in published.items() if key != "model_type"}
            return AutoConfig.for_model(published["model_type"], **fields)
        directory = self.folder.directory
        try:
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        except (ValueError, KeyError, OSError) as error:
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"The model in '{directory}' is made by Python code of its own, which training never runs: give one whose "
                    "architecture transformers has."
                ) from error
            raise UserError(f"transformers cannot read '{directory}/config.json': {one_line(error)}") from error
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"The checkpoint in '{directory}' is quantised already: name the original one.")
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise UserError(f"'{directory}' holds a {config.model_type} model, which is no causal language model.")
        return config

    @property
    def text_config(self) -> PretrainedConfig:
        """Of the language model, where the model sees images too."""
        return self.config.get_text_config()

    @property
    def attention(self) -> str:
        """Which implementation computes it."""
        if self.attn_implementation is not None:
            return self.attn_implementation
        network: Any = AutoModelForCausalLM._model_mapping[type(self.config)]
        capped = getattr(self.text_config, "attn_logit_softcapping", None) is not None
        return "sdpa" if network._supports_sdpa and not capped else "eager"

    @property
    def spec(self) -> LoRASpec:
        """Rank, alpha and kind of the adapter."""
        assert self.r is not None
        return LoRASpec(self.r, self.lora_alpha, self.use_dora)

    def lora_config(self, model: PreTrainedModel) -> LoraConfig:
        """PEFT's settings for a model.

        Raises:
            UserError: a head that is the embedding too would get an adapter.
        """
        targets = self.target_modules
        if targets == "all-linear" and any("experts" in name for name, _ in model.named_modules()):
            # PEFT's versions read "all-linear" differently there: some leave the experts out.
            targets = ATTENTION
        assert self.r is not None  # see _with_adapter
        alpha: Any = self.lora_alpha  # need not be whole, whatever the annotation says
        config = LoraConfig(
            r=self.r,
            lora_alpha=alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            lora_dropout=self.lora_dropout,
            use_dora=self.use_dora,
            task_type="CAUSAL_LM",
        )
        if getattr(self.text_config, "tie_word_embeddings", False) and "lm_head" in targets:
            raise UserError("model.target_modules: this model's head is its embedding (tied) and takes no LoRA.")
        return config

    def skeleton(self, dtype: torch.dtype, adapter_dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The model on the meta device, adapters included; nothing is read but config.json."""
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    self.config, dtype=dtype, attn_implementation=self.attention, trust_remote_code=False
                )
        except (ValueError, ImportError) as error:
            raise UserError(
                f"A {self.config.model_type} cannot be made with attn_implementation={self.attention}: {one_line(error)}"
            ) from error
        return self._with_adapter(model, adapter_dtype, empty=True)

    def load(self, dtype: torch.dtype, adapter_dtype: torch.dtype, seed: int, device: torch.device) -> PreTrainedModel:
        """The model with its weights, and the adapter that training starts from.

        Args:
            dtype (torch.dtype): of the frozen weights.
            adapter_dtype (torch.dtype): of the adapter's.
            seed (int): of a fresh adapter.
            device (torch.device): used in 4 bit only; otherwise weights lie on the CPU.

        Returns:
            PreTrainedModel: the causal LM itself, LoRA injected.

        Raises:
            UserError: damaged weights, missing ones, or an adapter that does not fit.
        """
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": self.attention, "trust_remote_code": False}
        if self.load_in_4bit:
            options |= four_bit(dtype) | {"device_map": {"": device}}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder.directory, output_loading_info=True, **options
            )
        except (RuntimeError, ValueError, OSError, ImportError) as error:
            raise UserError(f"The weights in '{self.path}' cannot be loaded: {one_line(error)}") from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
            raise UserError(f"The checkpoint in '{self.path}' lacks {missing[0]}: download it again.")
        torch.manual_seed(seed)
        model = self._with_adapter(model, adapter_dtype, empty=False)
        if self.adapter is not None:
            self._start_from(model, Path(self.adapter))
        return model

    def _with_adapter(self, model: PreTrainedModel, adapter_dtype: torch.dtype, empty: bool) -> PreTrainedModel:
        if self.r is None:
            return model
        try:
            adapted: Any = get_peft_model(
                model,
                self.lora_config(model),
                autocast_adapter_dtype=adapter_dtype is torch.float32,
                low_cpu_mem_usage=empty,
            )
        except ValueError as error:
            raise UserError(f"model.target_modules: {one_line(error)}") from error
        if any(isinstance(m, BaseTunerLayer) and isinstance(m.get_base_layer(), Conv1D) for m in adapted.modules()):
            raise UserError(
                f"The layers of a {self.config.model_type} store their weights transposed, which adapters here do not fit: train "
                "all weights, with model.r=null."
            )
        return adapted.get_base_model()

    def _start_from(self, model: PreTrainedModel, folder: Path) -> None:
        """Puts an adapter's weights into a model that has one of the same kind."""
        adapter, found = read_adapter(folder)
        if found != self.spec:
            raise UserError(
                f"The adapter in '{folder}' has {found._asdict()}, the config {self.spec._asdict()}: set model.r={found.rank} "
                f"model.lora_alpha={found.alpha:g} model.use_dora={found.dora}."
            )
        given = trained_tensors(adapter)
        parameters = trained_parameters(model)
        if other := sorted(given.keys() ^ parameters.keys()):
            raise UserError(
                f"The adapter in '{folder}' lies on other layers than the config's ({other[0]}): set model.target_modules as "
                "it was trained."
            )
        with torch.no_grad():
            for name, tensor in given.items():
                parameters[name].copy_(tensor)

    def check_adapter(self, names: dict[str, str]) -> None:
        """Raises UserError where the adapter that training goes on from is not of this model; names as in the checkpoint."""
        if self.adapter is not None:
            adapter, _ = read_adapter(Path(self.adapter))
            check_fits({names.get(name, name): u for name, u in adapter.items()}, self.folder, self.adapter)


def four_bit(dtype: torch.dtype) -> dict[str, Any]:
    """What makes ``from_pretrained`` quantise to NF4.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise UserError("model.load_in_4bit needs bitsandbytes: pip install bitsandbytes, or set load_in_4bit: False.")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=True
    )
    return {"quantization_config": quantization}


def checkpoint_names(model: PreTrainedModel, weights: dict[str, Any]) -> dict[str, str]:
    """Modules whose weights a checkpoint keeps under another name than the model does.

    Gemma 3's vision models were published before transformers renamed their modules.

    Args:
        model (PreTrainedModel): may lie on the meta device.
        weights (dict[str, Any]): by the checkpoint's names; values are not looked at.

    Returns:
        dict[str, str]: name of the module in the model -> in the checkpoint; those with one name for both are left out.
    """
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    names = {}
    for name in weights:
        renamed = name
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        if renamed != name and renamed.endswith(".weight"):
            names[renamed.removesuffix(".weight")] = name.removesuffix(".weight")
    return names


# Last names of an adapter's weights, as PEFT injects them -> as every backbone of ours calls them.
LEAVES = {
    "lora_A.default.weight": "lora_a.weight",
    "lora_B.default.weight": "lora_b.weight",
    "lora_magnitude_vector.default.weight": "magnitude",
}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, sharded or not: "model.layers.0.self_attn.q_proj.lora_a.weight", whole weights by their own names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            module, mark, leaf = name.partition(".lora_")
            found[f"{module}.{LEAVES.get(f'lora_{leaf}', f'lora_{leaf}')}" if mark else name] = parameter
    return found


def trained_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """An adapter under the names of :func:`trained_parameters`."""
    tensors = {}
    for module, update in adapter.items():
        tensors[f"{module}.lora_a.weight"], tensors[f"{module}.lora_b.weight"] = update.a, update.b
        if update.magnitude is not None:
            tensors[f"{module}.magnitude"] = update.magnitude
    return tensors


def adapter_of(trained: dict[str, torch.Tensor]) -> Adapter:
    """The inverse of :func:`trained_tensors`."""
    modules = [name.removesuffix(".lora_a.weight") for name in trained if name.endswith(".lora_a.weight")]
    return {
        module: Update(
            trained[f"{module}.lora_a.weight"], trained[f"{module}.lora_b.weight"], trained.get(f"{module}.magnitude")
        )
        for module in modules
    }
