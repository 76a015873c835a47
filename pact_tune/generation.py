"""Causal language models from a folder, and the answers that they give to rendered prompts."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pact_tune.batching import batches_by_length
from pact_tune.errors import UserError, cannot_load, one_line


def load_model(
    folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a model to compute with, not to train.

    Args:
        folder (str | Path): checkpoint in Hugging Face format.
        device (str | torch.device | None): default: a GPU where there is one.
        dtype (torch.dtype | None): default: float32 on a CPU, else the checkpoint's own.
        device_map (str | None): "auto" spreads the model over several GPUs (needs accelerate); `device` says the kind.
        trust_remote_code (bool): let the folder's own Python code run.

    Returns:
        PreTrainedModel: in eval mode, on the device.

    Raises:
        UserError: it cannot be loaded, or the device cannot be used.
    """
    device = usable_device(device or default_device())
    try:
        dtype = dtype or compute_dtype(folder, device, trust_remote_code)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a damaged file raises safetensors' own types, a missing package ImportError
        raise cannot_load("model", folder, error) from error
    return (model if device_map else model.to(device)).eval()


def usable_device(name: str | torch.device) -> torch.device:
    """A device by name.

    Raises:
        UserError: there is none of that name, or none here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: built without CUDA
        raise UserError(
            f"The device '{name}' cannot be used here ({one_line(error)}): choose cpu, or one that is here."
        ) from error
    return device


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_here(name: str) -> str:
    """A config's ``device`` on this machine: "auto" is a CUDA GPU where there is one, else the CPU."""
    return default_device() if name == "auto" else name


def compute_dtype(folder: str | Path, device: torch.device, trust_remote_code: bool = False) -> torch.dtype:
    """What a checkpoint is computed in unless told otherwise: float32 on a CPU, else its own type."""
    if device.type == "cpu":
        return torch.float32
    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).dtype or torch.float32


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a turn: the tokenizer's end token and those of the model's own generation config."""
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    return sorted({tokenizer.eos_token_id} | ({eos} if isinstance(eos, int) else set(eos or [])))


def generation_config(
    ends: Collection[int], pad_id: int, max_new_tokens: int, temperature: float = 0.0
) -> GenerationConfig:
    """How to generate, with nothing taken from the model's own file.

    Vendors' files set a repetition penalty and sampling, and then the answer is not the model's own choice.

    Args:
        ends (Collection[int]): ids that end a turn.
        pad_id (int): id to pad with.
        max_new_tokens (int): longest response.
        temperature (float): 0 is greedy.

    Returns:
        GenerationConfig: for :func:`generate`.
    """
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad_id,
        **sampling,
    )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    processors: Sequence[LogitsProcessor] = (),
    seed: int | None = None,
) -> list[list[int]]:
    """Answers one batch of prompts.

    Args:
        model (PreTrainedModel): causal language model.
        prompts (Sequence[list[int]]): token ids that end with the assistant header.
        config (GenerationConfig): of :func:`generation_config`.
        processors (Sequence[LogitsProcessor]): change the logits of every step, in order.
        seed (int | None): of sampled responses; the global random state is left as it was.

    Returns:
        list[list[int]]: one response a prompt, up to its end-of-turn token, which is included where the model produced it.
    """
    width = max(map(len, prompts))
    # On the left, so that every prompt ends where generation begins.
    ids = torch.tensor([[config.pad_token_id] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    # What a config leaves open transformers fills from the model's own: a vendor's repetition penalty, for one.
    own, model.generation_config = model.generation_config, config
    try:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            answer: Any = model.generate  # of another class of transformers, which all causal models have
            output = answer(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
            )
    finally:
        model.generation_config = own
    ends = set(config.eos_token_id)
    return [up_to_end(row, ends) for row in output[:, width:].tolist()]


def generate_all(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    tokens_per_batch: int = 4096,
    processors: Sequence[LogitsProcessor] = (),
    done: Callable[[list[int], list[list[int]]], None] = lambda batch, responses: None,
) -> list[list[int]]:
    """Answers any number of prompts, those of like length together.

    Args:
        model (PreTrainedModel): causal language model.
        prompts (Sequence[list[int]]): token ids that end with the assistant header.
        config (GenerationConfig): of :func:`generation_config`.
        tokens_per_batch (int): padded tokens of a forward pass.
        processors (Sequence[LogitsProcessor]): see :func:`generate`.
        done (Callable[[list[int], list[list[int]]], None]): told the indices and responses of each batch when it is done.

    Returns:
        list[list[int]]: as :func:`generate` gives them, in the order of the prompts.
    """
    responses: dict[int, list[int]] = {}
    for batch in generation_batches(prompts, config.max_new_tokens, tokens_per_batch):
        answers = generate(model, [prompts[i] for i in batch], config, processors)
        responses |= zip(batch, answers, strict=True)
        done(batch, answers)
    return [responses[i] for i in range(len(prompts))]


def generation_batches(prompts: Sequence[list[int]], max_new_tokens: int, tokens_per_batch: int) -> list[list[int]]:
    """Indices of prompts by batch."""
    # Padding costs the reading of the prompt alone, and every further prompt makes each new token cheaper.
    return batches_by_length([len(p) + max_new_tokens for p in prompts], tokens_per_batch, least_filled=0)


def up_to_end(response: list[int], ends: Collection[int]) -> list[int]:
    """A response without what follows its first end-of-turn token."""
    return response[: next((i + 1 for i, token in enumerate(response) if token in ends), len(response))]


def decode(tokenizer: PreTrainedTokenizerBase, response: list[int], ends: Collection[int]) -> tuple[str, bool]:
    """The text of a response without its end-of-turn token, and whether it has one."""
    ended = bool(response) and response[-1] in ends
    return str(tokenizer.decode(response[:-1] if ended else response)), ended
