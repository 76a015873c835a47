"""Teacher-forced scores: what a model makes of given responses, and how far that is from another model."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from pact_tune.batching import Batch, batches_by_prefix, collate, shared_prefix
from pact_tune.conversations import Conversation
from pact_tune.hf.prefix import below_head, find_longest_shared, inputs_of
from pact_tune.losses import token_kl

# A prompt and a response of at least one token, as token ids.
Pair = tuple[list[int], list[int]]

# Positions t of a response, counted from 0: where refusals are decided, the rest of an opening, the body.
POSITION_RANGES: dict[str, tuple[int, int | None]] = {"0": (0, 1), "1-7": (1, 8), "8+": (8, None)}

# Bytes of fp32 logits that exist at a time. Above 32 MB glibc asks the kernel for new pages every time: half the speed.
CHUNK_BYTES = {"cpu": 28_000_000, "cuda": 256_000_000}

_LONGEST_SHARED: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()  # of the models that were asked


def batches_of(pairs: Sequence[Pair], tokens_per_batch: int) -> list[list[int]]:
    """Cuts pairs into batches, of those that begin alike and are of like lengths.

    Args:
        pairs (Sequence[Pair]): prompts and responses.
        tokens_per_batch (int): padded tokens of a forward pass.

    Returns:
        list[list[int]]: their numbers; depends on the arguments alone.
    """
    return batches_by_prefix(list(map(_conversation, pairs)), tokens_per_batch)


@torch.inference_mode()
def response_logits(model: PreTrainedModel, pairs: Sequence[Pair]) -> Iterator[torch.Tensor]:
    """Logits at the response positions of one batch, in chunks: the tensor of the vocabulary's size is never whole.

    What all prompts begin with is computed once, where the model allows it and it saves enough.

    Args:
        model (PreTrainedModel): causal language model of transformers.
        pairs (Sequence[Pair]): prompts and responses.

    Yields:
        torch.Tensor: ``[n, V]`` float32 on the model's device; all chunks together hold every response token of every
        pair, in order.
    """
    rows = list(map(_conversation, pairs))
    batch = collate(rows, 0, prefix=shared_prefix(rows, _longest_shared(model)))
    output, hidden = _trunk(model, batch)
    chunk = max(1, CHUNK_BYTES[hidden.device.type] // (4 * model.get_output_embeddings().weight.shape[0]))
    for part in hidden.split(chunk):
        yield _logits(model, output, part).float()


def _conversation(pair: Pair) -> Conversation:
    prompt, response = pair
    return Conversation(prompt + response, [(len(prompt), len(prompt) + len(response))])


def _body(model: PreTrainedModel) -> Any:
    """What the model's own forward calls below its head; not base_model, which OPT's head does not call."""
    return below_head(model, model.get_decoder())


def _trunk(model: PreTrainedModel, batch: Batch) -> tuple[Any, torch.Tensor]:
    """What the model below its head gives for a batch, and of that the hidden states at response positions, ``[T, H]``."""
    batch = batch.to(model.device)
    with inputs_of(model, batch) as inputs:
        output = _body(model)(**inputs, use_cache=False)
    hidden = output.last_hidden_state
    return output, hidden.flatten(0, 1).index_select(0, batch.index.to(hidden.device))  # a device map ends elsewhere


def _longest_shared(model: PreTrainedModel) -> int:
    """Up to which length the model computes rows behind a shared prefix; it is found out once a model."""
    if model not in _LONGEST_SHARED:
        _LONGEST_SHARED[model] = find_longest_shared(model, lambda batch: _trunk(model, batch)[1])
    return _LONGEST_SHARED[model]


def _logits(model: PreTrainedModel, output: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits ``[n, V]`` of hidden rows ``[n, H]`` as the model itself makes them (soft-cap, scale and all)."""
    body = _body(model)
    rows = copy.copy(output)
    rows.last_hidden_state = hidden[None]
    before = body.__dict__.get("forward")  # accelerate puts its own there
    body.forward = lambda *args, **kwargs: rows
    try:
        dummy = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return model(input_ids=dummy, use_cache=False).logits[0]
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before


def response_logprobs(
    model: PreTrainedModel, pairs: Sequence[Pair], tokens_per_batch: int = 4096
) -> Iterator[torch.Tensor]:
    """Log-probabilities over the vocabulary at every position of given responses.

    Args:
        model (PreTrainedModel): causal language model of transformers.
        pairs (Sequence[Pair]): prompts and responses.
        tokens_per_batch (int): padded tokens of a forward pass.

    Yields:
        torch.Tensor: ``[tokens of the response, V]`` float32 on the model's device, one a pair, in order.
    """
    for batch in _in_order(pairs, tokens_per_batch):
        logprobs = torch.cat([logits.log_softmax(-1) for logits in response_logits(model, batch)])
        yield from logprobs.split([len(response) for _, response in batch])


def token_logprobs(model: PreTrainedModel, pairs: Sequence[Pair], tokens_per_batch: int = 4096) -> list[torch.Tensor]:
    """Log-probability of each token of given responses.

    Args:
        model (PreTrainedModel): causal language model of transformers.
        pairs (Sequence[Pair]): prompts and responses.
        tokens_per_batch (int): padded tokens of a forward pass.

    Returns:
        list[torch.Tensor]: ``[tokens of the response]`` float32 on the CPU, one a pair, in order.
    """
    found: dict[int, torch.Tensor] = {}
    for batch in batches_of(pairs, tokens_per_batch):
        labels = torch.tensor([token for i in batch for token in pairs[i][1]], dtype=torch.long)
        parts, start = [torch.zeros(0)], 0
        for logits in response_logits(model, [pairs[i] for i in batch]):
            label = labels[start : start + len(logits)].to(logits.device)
            parts.append(logits.log_softmax(-1).gather(1, label[:, None])[:, 0].cpu())
            start += len(logits)
        found |= zip(batch, torch.cat(parts).split([len(pairs[i][1]) for i in batch]), strict=True)
    return [found[i] for i in range(len(pairs))]


@dataclass(frozen=True)
class Comparison:
    """A model beside a frozen one at the positions of one response.

    Attributes:
        kl (torch.Tensor): KL(reference || model) over the whole vocabulary, ``[n]`` in nats.
        loss (torch.Tensor): the model's cross-entropy of each token, ``[n]`` in nats.
        mass (torch.Tensor): the model's probability of the given columns together, ``[n]``.
    """

    kl: torch.Tensor
    loss: torch.Tensor
    mass: torch.Tensor


def compare(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    columns: Sequence[int] = (),
    tokens_per_batch: int = 4096,
) -> list[Comparison]:
    """Compares a model with a frozen one on given responses; no tensor of responses times vocabulary is whole.

    Args:
        reference (PreTrainedModel): the frozen model.
        model (PreTrainedModel): the one under test, with as many rows in its head, on the same kind of device.
        pairs (Sequence[Pair]): prompts and responses.
        columns (Sequence[int]): token ids whose probability is summed.
        tokens_per_batch (int): padded tokens of a forward pass.

    Returns:
        list[Comparison]: on the CPU, one a pair, in order. See :func:`mean_by_range`.
    """
    found: dict[int, Comparison] = {}
    for batch in batches_of(pairs, tokens_per_batch):
        rows = [pairs[i] for i in batch]
        labels = torch.tensor([token for _, response in rows for token in response])
        parts, start = [], 0
        for p, q in zip(response_logits(reference, rows), response_logits(model, rows), strict=True):
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            label = labels[start : start + len(q)].to(q.device)
            loss = -q.gather(1, label[:, None])[:, 0]
            mass = q[:, list(columns)].exp().sum(-1)
            parts.append(torch.stack([token_kl(p, q.to(p.device)).cpu(), loss.cpu(), mass.cpu()]))
            start += len(q)
        split = torch.cat(parts, dim=1).split([len(response) for _, response in rows], dim=1)
        found |= zip(batch, [Comparison(*values) for values in split], strict=True)
    return [found[i] for i in range(len(pairs))]


def mean_by_range(per_token: Sequence[torch.Tensor]) -> dict[str, float]:
    """Means of numbers a position, over :data:`POSITION_RANGES` that occur, and over all of them as "all".

    Args:
        per_token (Sequence[torch.Tensor]): ``[tokens of the response]`` a response.

    Returns:
        dict[str, float]: by name of the range.
    """
    ranges = {name: torch.cat([row[start:end] for row in per_token]) for name, (start, end) in POSITION_RANGES.items()}
    ranges["all"] = torch.cat(list(per_token))
    return {name: values.mean().item() for name, values in ranges.items() if len(values)}


def _in_order(pairs: Sequence[Pair], tokens_per_batch: int) -> Iterator[list[Pair]]:
    """Pairs in batches of neighbours, so that what is yielded for each need not wait for the others."""
    batch: list[Pair] = []
    width = 0
    for pair in pairs:
        length = len(pair[0]) + len(pair[1])
        if batch and max(width, length) * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch, width = [], 0
        batch.append(pair)
        width = max(width, length)
    if batch:
        yield batch
