"""Models that answer benchmarks: a folder in transformers, the same in vLLM, or an endpoint."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pact_tune import generation, hub
from pact_tune.adapters import is_adapter
from pact_tune.conversations import Message, load_tokenizer, one_line, render_prompt
from pact_tune.environment import install
from pact_tune.errors import UserError
from pact_tune.evaluation.endpoint import Endpoint
from pact_tune.fingerprints import file_digest, model_fingerprint

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text (str): without the end-of-turn token.
        ended (bool): the model ended its turn itself, rather than being cut off.
        tokens (list[int] | None): as generated, the end-of-turn token included; None where only text is known.
    """

    text: str
    ended: bool
    tokens: list[int] | None = None


class Model(Protocol):
    """Anything that answers chats.

    Attributes:
        settings (dict[str, Any]): all that its answers depend on, beside the chats.
    """

    settings: dict[str, Any]

    def batches(self, chats: Sequence[list[Message]], max_new_tokens: int) -> list[list[int]]:
        """Which chats to answer together, as indices; depends on the chats alone, so that a resumed run repeats it."""
        ...

    def answer(self, chats: Sequence[list[Message]], max_new_tokens: int, batch: int) -> list[Answer]:
        """Answers one batch; `batch` is its number, which seeds sampling."""
        ...


@dataclass(frozen=True)
class _Files:
    """Where a model's parts lie."""

    weights: Path
    adapter: Path | None
    tokenizer: Path


def _files(name: str) -> _Files:
    """A checkpoint's folder, or an adapter's and its base's."""
    folder = Path(name)
    if not is_adapter(folder):
        folder = hub.model_folder(name)
        return _Files(folder, None, folder)
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"'{folder / ADAPTER_CONFIG}' does not name its base model: take the adapter from where it was made."
        ) from error
    if not base:
        raise UserError(
            f"'{folder / ADAPTER_CONFIG}' does not name its base model: write its path to base_model_name_or_path."
        )
    weights = hub.model_folder(base)
    return _Files(weights, folder, folder if (folder / "tokenizer_config.json").is_file() else weights)


def _with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with LoRA layers put in; they are not merged, since merging would round to the base's dtype."""
    try:
        import peft
    except ImportError as error:
        raise UserError(f"Adapters need peft: {install('eval')}.") from error
    try:
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder))
        return adapted.get_base_model().eval()
    except Exception as error:  # peft raises whatever does not fit
        raise UserError(
            f"The adapter in '{folder}' does not fit the base model that it names ({one_line(error)})."
        ) from error


def _adapter_fingerprint(folder: Path) -> str:
    """Hash of an adapter's weights and settings, without the path of its base, which has a hash of its own."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {"base_model_name_or_path": None}
    weights = sorted(folder.glob("adapter_model*"))
    text = json.dumps([config, *(file_digest(file).hex() for file in weights)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Local:
    """A checkpoint or LoRA adapter folder, or a Hub name, in transformers.

    Nothing is loaded before it is needed: a finished evaluation needs no model.

    Args:
        name (str): folder or Hub name.
        device (str | None): default: a GPU where there is one.
        tokens_per_batch (int): padded tokens of a forward pass.
        temperature (float): 0 is greedy.
        seed (int): of sampled answers.

    Raises:
        UserError: no such model, or one without a tokenizer or chat template.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str | None = None,
        tokens_per_batch: int = 8192,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        if device is not None:
            generation.usable_device(device)
        self.files = _files(name)
        self.tokenizer = load_tokenizer(str(self.files.tokenizer))
        self.device, self.tokens_per_batch, self.temperature, self.seed = device, tokens_per_batch, temperature, seed
        self.settings: dict[str, Any] = {
            "engine": "hf",
            "model": str(name),
            "version": model_fingerprint(self.files.weights),
            "adapter": _adapter_fingerprint(self.files.adapter) if self.files.adapter else None,
            "tokens_per_batch": tokens_per_batch,
            "temperature": temperature,
            "seed": seed if temperature else None,
        }

    @functools.cached_property
    def network(self) -> PreTrainedModel:
        """The loaded model."""
        model = generation.load_model(self.files.weights, self.device)
        return model if self.files.adapter is None else _with_adapter(model, self.files.adapter)

    @property
    def vocabulary(self) -> int:
        """Rows of the output head."""
        return self.network.get_output_embeddings().weight.shape[0]

    def release(self) -> None:
        """Lets go of the loaded model."""
        self.__dict__.pop("network", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def prompt(self, chat: list[Message]) -> list[int]:
        """A chat as the model is prompted with it: the template applied once, with its own BOS and no other."""
        return render_prompt(self.tokenizer, chat)

    def batches(self, chats: Sequence[list[Message]], max_new_tokens: int) -> list[list[int]]:
        return generation.generation_batches(list(map(self.prompt, chats)), max_new_tokens, self.tokens_per_batch)

    def answer(self, chats: Sequence[list[Message]], max_new_tokens: int, batch: int) -> list[Answer]:
        ends = generation.end_tokens(self.network, self.tokenizer)
        config = generation.generation_config(ends, self.tokenizer.pad_token_id, max_new_tokens, self.temperature)
        prompts = list(map(self.prompt, chats))
        responses = generation.generate(self.network, prompts, config, seed=self.seed * 1_000_003 + batch)
        return [Answer(*generation.decode(self.tokenizer, r, ends), tokens=r) for r in responses]


class VLLM:
    """A checkpoint in vLLM. Prompts are given as token ids, so that vLLM adds no second BOS.

    Args:
        name (str): folder or Hub name; an adapter must be merged first.
        temperature (float): 0 is greedy.
        seed (int): of sampled answers.

    Raises:
        UserError: vLLM is not installed, or the model cannot be had.
    """

    def __init__(self, name: str, *, temperature: float = 0.0, seed: int = 0) -> None:
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                "vLLM is not installed here: pip install vllm (in an environment of its own), or --engine hf."
            ) from error
        self.vllm = vllm
        files = _files(name)
        if files.adapter:
            raise UserError(
                f"'{name}' is an adapter, and --engine vllm takes whole models: give the merged checkpoint, or --engine hf."
            )
        self.folder, self.temperature, self.seed = files.weights, temperature, seed
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(files.tokenizer))
        self.settings: dict[str, Any] = {
            "engine": "vllm",
            "model": str(name),
            "version": model_fingerprint(files.weights),
            "temperature": temperature,
            "seed": seed if temperature else None,
        }

    @functools.cached_property
    def engine(self) -> Any:
        return self.vllm.LLM(model=str(self.folder), seed=self.seed)

    def batches(self, chats: Sequence[list[Message]], max_new_tokens: int) -> list[list[int]]:
        # vLLM forms its own batches; these are only how often work is saved.
        return [list(range(start, min(start + 256, len(chats)))) for start in range(0, len(chats), 256)]

    def answer(self, chats: Sequence[list[Message]], max_new_tokens: int, batch: int) -> list[Answer]:
        prompts = [{"prompt_token_ids": render_prompt(self.tokenizer, chat)} for chat in chats]
        parameters = self.vllm.SamplingParams(temperature=self.temperature, max_tokens=max_new_tokens, seed=self.seed)
        outputs = [output.outputs[0] for output in self.engine.generate(prompts, parameters)]
        return [Answer(o.text, o.finish_reason == "stop", list(o.token_ids)) for o in outputs]


class Remote:
    """A model behind an OpenAI-compatible endpoint, which applies the chat template itself."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.settings: dict[str, Any] = {
            "engine": "endpoint",
            "model": endpoint.model,
            "url": endpoint.url,
            "temperature": endpoint.temperature,
            "seed": endpoint.seed if endpoint.temperature else None,
        }

    def batches(self, chats: Sequence[list[Message]], max_new_tokens: int) -> list[list[int]]:
        step = 2 * self.endpoint.parallel
        return [list(range(start, min(start + step, len(chats)))) for start in range(0, len(chats), step)]

    def answer(self, chats: Sequence[list[Message]], max_new_tokens: int, batch: int) -> list[Answer]:
        return [Answer(text, ended) for text, ended in self.endpoint.answer(chats, max_new_tokens)]
