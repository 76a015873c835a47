"""Rows behind a shared prefix in models of transformers: up to which length a model may, and its attention meanwhile."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pact_tune.batching import Batch, collate
from pact_tune.conversations import Conversation
from pact_tune.prefixes import SharedPrefix

SHARED = "pact_tune_shared_prefix"  # name of the attention of rows behind a shared prefix
LIMITS = ("sliding_window", "attention_chunk_size", "max_position_embeddings")  # how far back a layer may look
# How far two ways to compute a number may differ, of the largest.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def below_head(model: PreTrainedModel, found: Any) -> Any:
    """``found``, a model's body as transformers finds it; Llama 4's class names one that it does not have, and is found itself."""
    return model.model if found is model else found


@contextlib.contextmanager
def inputs_of(model: PreTrainedModel, batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
    """What a model is called with for a batch; its attention is the batch's while this is open.

    There is never a mask: padding stands on the right, and packed rows are told apart by their positions starting anew.

    Args:
        model (PreTrainedModel): the causal LM itself, not PEFT's or DDP's wrapper.
        batch (Batch): on the model's device.

    Yields:
        dict[str, torch.Tensor]: keyword arguments.
    """
    inputs = {"input_ids": batch.tokens}
    if batch.input_pos is not None:
        inputs["position_ids"] = batch.input_pos
    if batch.shared is None:
        yield inputs
        return
    config = model.config.get_text_config()
    own, config._attn_implementation = config._attn_implementation, SHARED
    # Under a name that no mask is known for transformers makes none.
    ALL_ATTENTION_FUNCTIONS.register(SHARED, functools.partial(_attention, batch.shared))
    try:
        with torch.compiler.set_stance("force_eager"):  # layouts differ, and each would be compiled
            yield inputs
    finally:
        config._attn_implementation = own


def _attention(
    shared: SharedPrefix,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' "sdpa" for rows behind a shared prefix."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        output, _ = own(module, query, key, value, None if mask is None else mask[None, None], **options)
        return output.transpose(1, 2)

    # A device map puts layers on several devices.
    return shared.to(query.device).attention(attend, query, key, value).transpose(1, 2).contiguous(), None


@torch.no_grad()
def find_longest_shared(model: PreTrainedModel, hidden: Callable[[Batch], torch.Tensor]) -> int:
    """Finds out whether, and up to which length, a model may compute rows behind a shared prefix.

    That is where attention is transformers' "sdpa", positions can be given, and no layer looks less far back than a row is
    long; a few tokens tell the rest (ALiBi, recurrent layers, attention of a model's own).

    Args:
        model (PreTrainedModel): the causal LM itself, not PEFT's or DDP's wrapper.
        hidden (Callable[[Batch], torch.Tensor]): its hidden states at the response positions of a batch on the CPU,
            ``[T, H]``, with nothing stochastic.

    Returns:
        int: the longest row, in tokens; 0 where it may not.
    """
    config = model.config.get_text_config()
    accepted = inspect.signature(below_head(model, model.base_model).forward).parameters
    if config._attn_implementation != "sdpa" or "position_ids" not in accepted:
        return 0
    tokens = [token % config.vocab_size for token in range(5, 13)]
    rows = [Conversation(tokens[:3] + tokens[a:b], [(4, 3 + b - a)]) for a, b in ((3, 6), (5, 8), (6, 8))]
    apart = hidden(collate(rows, 0))
    try:
        behind = hidden(collate(rows, 0, prefix=3))
    except TypeError:  # of the model's own code, which expects a mask with an attention that it does not know (Falcon)
        return 0
    if not (apart - behind).abs().max() <= TOLERANCE[apart.dtype] * apart.abs().max():
        return 0
    return min(filter(None, (getattr(config, name, None) for name in LIMITS)), default=0)
