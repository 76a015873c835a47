"""A GGUF file (llama.cpp) to a Hugging Face checkpoint with tokenizer and chat template.

transformers reads the tensors. What it leaves out of a file's meaning is set here, because a model that is slightly
wrong still talks: how text is split before byte-pair merges, Llama 3's stretched RoPE, head sizes, and the second
end-of-turn token.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    modeling_gguf_pytorch_utils,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as transformers_logging

from pact_tune.conversations import one_line
from pact_tune.environment import install
from pact_tune.errors import UserError
from pact_tune.files import atomic_folder, check_replaceable
from pact_tune.log import progress

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RECORD_FILE = "gguf.json"  # in the checkpoint: where it comes from
FILES = (RECORD_FILE, "*config.json", "model*.safetensors*", "tokenizer.json", "special_tokens_map.json", "*.jinja")
STORED_WHOLE = ("F32", "F16", "BF16")  # types of tensors that nobody quantised

# How text is cut before merges: `tokenizer.ggml.pre` -> (regular expression, or None for GPT-2's own; digits apart).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS: dict[str, tuple[str | None, bool]] = {
    "gpt-2": (None, False),
    "smollm": (None, True),
    "llama-bpe": (_LLAMA3, False),
    "qwen2": (_QWEN2, False),
    "deepseek-r1-qwen": (_QWEN2, False),
}


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        output (Path): the checkpoint.
        name (str): the model's name as the file has it.
        architecture (str): one of :data:`ARCHITECTURES`.
        types (dict[str, list[str]]): type of storage in the file -> names of the tensors stored so.
        dtype (str): what they were written as.
        has_template (bool): the file brought a chat template.
    """

    output: Path
    name: str
    architecture: str
    types: dict[str, list[str]]
    dtype: str
    has_template: bool


def import_gguf(file: str | Path, output: str | Path, dtype: str = "float32") -> Imported:
    """Writes a GGUF file as a Hugging Face checkpoint, dequantised.

    Args:
        file (str | Path): the GGUF file, whole.
        output (str | Path): folder to write; an earlier import there is replaced, anything else is left alone.
        dtype (str): a key of :data:`DTYPES`; float32 holds exactly what the file holds.

    Returns:
        Imported: what was read and written.

    Raises:
        UserError: no such file, damaged, of another family, or with something that could not be carried over.
    """
    file, output = Path(file), Path(output)
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, not '{dtype}'.")
    check_replaceable(output, RECORD_FILE, FILES)
    header = _read_header(file)
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with _quietly(), _damage_as_user_error(file):
        tokenizer = _tokenizer(place, header)
        config = _config(place, header)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=DTYPES[dtype], output_loading_info=True
        )
    model, loading = loaded
    _check_complete(file, header, model, loading)
    # The weights are plain now; save_pretrained refuses a model that says otherwise.
    del model.config.quantization_config
    model.hf_quantizer = None
    ends = header.end_tokens
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    result = Imported(output, header.name, header.architecture, header.types, dtype, bool(tokenizer.chat_template))
    with atomic_folder(output, RECORD_FILE, FILES) as folder:
        with _quietly():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        (folder / RECORD_FILE).write_text(json.dumps(_record(file, header, dtype), indent=1) + "\n")
    return result


# --- the file


@dataclass(frozen=True)
class _Header:
    """What a GGUF file says of itself: its values by key, and per type of storage the tensors' names."""

    fields: dict[str, Any]
    types: dict[str, list[str]]
    rope_factors: torch.Tensor | None  # [head_dim / 2]: what each RoPE frequency is divided by

    @property
    def architecture(self) -> str:
        return self.fields["general.architecture"]

    @property
    def name(self) -> str:
        return self.fields.get("general.name", "unnamed")

    @property
    def tokens(self) -> list[str]:
        return self.fields["tokenizer.ggml.tokens"]

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end an answer: of the text, and of the turn where that is another one."""
        keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        return sorted({self.fields[key] for key in keys if key in self.fields})

    def size(self, key: str) -> Any:
        """A value of the model's architecture, or None."""
        return self.fields.get(f"{self.architecture}.{key}")


def _read_header(file: Path) -> _Header:
    """Reads and checks everything but the weights."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"Reading GGUF needs the package gguf: {install('gguf')}.") from error
    if not file.is_file():
        raise UserError(f"'{file}' does not exist or is no file: give a .gguf file.")
    if file.open("rb").read(4) != b"GGUF":
        raise UserError(f"'{file}' is no GGUF file (its first bytes are not 'GGUF').")
    with _damage_as_user_error(file):
        reader = GGUFReader(file)
        # Arrays of a number a token (scores, types) are long and read by transformers itself.
        fields = {key: f.contents() for key, f in reader.fields.items() if not key.endswith((".merges", ".scores"))}
        types: dict[str, list[str]] = {}
        for tensor in reader.tensors:
            types.setdefault(tensor.tensor_type.name, []).append(tensor.name)
        stretch = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
        header = _Header(fields, types, torch.tensor(stretch[0].copy()) if stretch else None)
        parts = fields.get("split.count", 1)
    if parts > 1:
        raise UserError(f"'{file}' is one of {parts} parts: merge them first with `llama-gguf-split --merge`.")
    if fields.get("general.architecture") not in ARCHITECTURES:
        raise UserError(
            f"'{file}' holds a model of the architecture '{fields.get('general.architecture')}'; these can be imported: "
            f"{', '.join(ARCHITECTURES)}."
        )
    if "tokenizer.ggml.tokens" not in fields:
        raise UserError(f"'{file}' holds no tokenizer: give the file of a language model.")
    if not header.end_tokens:
        raise UserError(f"'{file}' does not say which token ends an answer (tokenizer.ggml.eos_token_id is missing).")
    if header.size("expert_count"):
        raise UserError(f"'{file}' holds a mixture of experts, which cannot be imported.")
    if header.size("rope.scaling.type") not in (None, "none"):
        raise UserError(
            f"'{file}' stretches its positions by '{header.size('rope.scaling.type')}', which cannot be carried over: "
            "give the file of a model without RoPE scaling, or the model's own checkpoint."
        )
    return header


def _record(file: Path, header: _Header, dtype: str) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    facts = ("name", "organization", "license", "finetune", "quantized_by")
    return {
        "file": file.name,
        "sha256": digest.hexdigest(),
        **{fact: header.fields[f"general.{fact}"] for fact in facts if f"general.{fact}" in header.fields},
        "architecture": header.architecture,
        "tensors": dict(Counter({name: len(tensors) for name, tensors in header.types.items()})),
        "dtype": dtype,
    }


# --- tokenizer


def _tokenizer(place: dict[str, str], header: _Header) -> PreTrainedTokenizerBase:
    """The file's tokenizer, with its tokens alone: transformers' class adds an unknown token where the file has none."""
    read = AutoTokenizer.from_pretrained(**place)
    backend = json.loads(read.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["id"] < len(header.tokens)]
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: header.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        **{name: header.tokens[token] for name, token in ids.items() if token is not None},
        chat_template=read.chat_template,
        model_max_length=header.size("context_length"),
        clean_up_tokenization_spaces=False,
    )
    if header.fields.get("tokenizer.ggml.model") == "gpt2":
        _set_split(tokenizer, header.fields.get("tokenizer.ggml.pre", "default"))
    return tokenizer


def _set_split(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Cuts text as the vocabulary's merges were learned; other cuts give tokens that the model never saw."""
    if name not in _SPLITS:
        raise UserError(f"The file's tokenizer splits text by the rules '{name}'; known are: {', '.join(_SPLITS)}.")
    pattern, digits = _SPLITS[name]
    cuts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        cuts.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    if pattern == _QWEN2:
        backend.normalizer = normalizers.NFC()
    if pattern == _LLAMA3:
        backend.model.ignore_merges = True  # a word that is a token is that token


# --- configuration


def _config(place: dict[str, str], header: _Header) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(**place)
    architecture = header.architecture
    if architecture == "qwen3":
        config.head_dim = header.size("attention.key_length") or config.head_dim
    if architecture in ("gemma2", "gemma3"):
        _set_gemma(config, header)
    if header.rope_factors is not None:
        _stretch_rope(config, header.rope_factors)
    return config


def _set_gemma(config: PretrainedConfig, header: _Header) -> None:
    """What llama.cpp knows of Gemma by heart, and the two bases of Gemma 3's RoPE."""
    if config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[header.architecture]:  # the 27B models
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    else:
        config.query_pre_attn_scalar = config.head_dim
    if header.architecture == "gemma3":
        config.rope_parameters["full_attention"]["rope_theta"] = header.size("rope.freq_base") or 1e6


def _stretch_rope(config: PretrainedConfig, factors: torch.Tensor) -> None:
    """Finds Llama 3's RoPE settings from the factors that the file stores in their place."""
    theta = config.rope_parameters["rope_theta"]
    settings = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    plain, _ = ROPE_INIT_FUNCTIONS["llama3"](_with_rope(config, theta, settings | {"factor": 1.0}), "cpu")
    settings["factor"] = round(factors.max().item(), 4)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](_with_rope(config, theta, settings), "cpu")
    if not torch.allclose(plain / stretched, factors.flatten(), rtol=1e-3):
        raise UserError(
            "The file's tensor 'rope_freqs.weight' stretches positions in another way than Llama 3 does, which cannot be "
            "carried over: take the model's own checkpoint."
        )


def _with_rope(config: PretrainedConfig, theta: float, settings: dict[str, float]) -> PretrainedConfig:
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": theta, **settings}
    return config


# --- checks


def _check_complete(file: Path, header: _Header, model: torch.nn.Module, loading: dict[str, Any]) -> None:
    """Raises UserError unless every tensor of the file is in the model, and every weight of the model in the file."""
    names = {name for tensors in header.types.values() for name in tensors} - {"rope_freqs.weight"}
    weights = len(list(model.parameters()))  # tied ones count once
    if loading["missing_keys"] or len(names) != weights:
        missing = f", {sorted(loading['missing_keys'])[0]} is missing" if loading["missing_keys"] else ""
        raise UserError(
            f"'{file}' has {len(names)} tensors where the model has {weights} weights{missing}: the file is incomplete or "
            "of a variant that cannot be imported."
        )


@contextlib.contextmanager
def _damage_as_user_error(file: Path) -> Iterator[None]:
    """A damaged file makes its readers stumble over whatever they meet."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"'{file}' could not be read ({one_line(error)}): it is damaged or incomplete.") from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' remarks, and with our bar for its own; the command says itself what it does."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    module: Any = modeling_gguf_pytorch_utils
    bar = module.tqdm
    module.tqdm = lambda tensors, **_: progress(tensors, desc="Dequantising", unit="tensor")
    try:
        yield
    finally:
        module.tqdm = bar
        transformers_logging.set_verbosity(before)
