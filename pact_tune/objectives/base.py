"""What a run minimises, as a value: which numbers it reads of student and reference, and what it makes of them.

A method is one file beside this one with one function, which a config names in ``loss._component_``:

    def my_method(context: Context, strength: float = 1.0) -> Objective: ...

The loss is coefficients times terms and is written once, in :meth:`Objective.loss`; the training loop, the cache and the
decoders know no method by name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from transformers import PreTrainedTokenizerBase

from pact_tune.adapters import Finish
from pact_tune.conversations import Conversation
from pact_tune.reference.readings import Nothing, Reading
from pact_tune.weights import ModelFolder

View = Literal["full", "response_only"]
Step = list[int]  # row numbers of one optimiser step


def _rows_as_they_are(module: str, rows: torch.Tensor) -> torch.Tensor:
    return rows


class Context(NamedTuple):
    """What a method may look at when it is built; no weights are loaded yet.

    Attributes:
        tokenizer (PreTrainedTokenizerBase): of the run.
        vocab_size (int): rows of the model's output head.
        device (torch.device): where losses are computed.
        weights_hash (str | None): of the frozen aligned model; None where there is no checkpoint.
        aligned (ModelFolder | None): the checkpoint of the frozen aligned model.
        adapted (Mapping[str, str]): the modules with an adapter, from the trainer's names to Hugging Face's.
        own_rows (Callable[[str, torch.Tensor], torch.Tensor]): rows of a module's weight (its name first, Hugging Face's) from
            Hugging Face's order to the trainer's, which its adapter's B has.
    """

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    device: torch.device = torch.device("cpu")
    weights_hash: str | None = None
    aligned: ModelFolder | None = None
    adapted: Mapping[str, str] = {}
    own_rows: Callable[[str, torch.Tensor], torch.Tensor] = _rows_as_they_are


class Chunk(NamedTuple):
    """Student and reference at n response positions, whichever rows they belong to.

    Attributes:
        label_logprobs (torch.Tensor): the student's log-probability of the true next token, ``[n]`` float32, nats.
        student (torch.Tensor): the objective's reading of the student, ``[n, C]``; C is 0 where it reads nothing.
        reference (Mapping[View, torch.Tensor]): the same of the reference, a view each.
        position (torch.Tensor): t, counted from 0 at the start of each response, ``[n]``.
        row (torch.Tensor): number of its conversation in the batch, ``[n]``.
        ce_weight (torch.Tensor): weight of its cross-entropy, ``[n]``; 0: not trained.
        weight (torch.Tensor): weight of its constraint, ``[n]``; 0: not constrained.
    """

    label_logprobs: torch.Tensor
    student: torch.Tensor
    reference: Mapping[View, torch.Tensor]
    position: torch.Tensor
    row: torch.Tensor
    ce_weight: torch.Tensor
    weight: torch.Tensor

    @property
    def ce(self) -> torch.Tensor:
        """Cross-entropy summed over positions, by their weights; nats."""
        return -(self.label_logprobs * self.ce_weight).sum()


class Stateful(Protocol):
    """Something that a resumed run must find as it was left."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Stream:
    """A second stream of rows, such as alignment data or anchors.

    Attributes:
        rows (Sequence[Conversation]): appended to the run's own rows, and numbered on from them.
        arrange (Callable): (steps of an epoch, number of the stream's first row, epoch) to the steps that are run. Must
            give every epoch as many.
        alone (bool): the constraint is on these rows alone, and its terms are means over their positions.
    """

    rows: Sequence[Conversation]
    arrange: Callable[[list[Step], int, int], list[Step]]
    alone: bool = False

    def beside(self, rows: Sequence[Conversation]) -> list[Conversation]:
        """The run's own rows as they are beside the stream's: without the constraint, where that is on these alone."""
        return [replace(row, weight=0.0) for row in rows] if self.alone else list(rows)


@dataclass(frozen=True)
class Objective:
    """What a run minimises. Everything but the first three has an empty default.

    Attributes:
        settings (dict[str, Any]): "method", whether it is "constrained", and every setting; JSON-serialisable, for the
            stamp that a result carries and for telling runs apart.
        terms (Callable[[Chunk], dict[str, torch.Tensor]]): named numbers, each summed over the chunk's positions.
        coefficients (dict[str, float]): of the terms that make up the loss. Changed by ``after_step`` alone.
        metrics (tuple[str, ...]): terms that are only logged.
        reading (Reading): what is read of student and reference beside the labels' log-probabilities.
        views (tuple[View, ...]): of the reference that are needed; none: there is no reference.
        response_only_bos (bool): the response-only view begins with BOS where the chat template does.
        response_only_tokens (int | None): response tokens of that view that are needed at most; None is all.
        notes (tuple[str, ...]): lines for the log.
        report (Callable | None): given (full view ``[T, C]``, position ``[T]``) of some batches, says what the reference
            looks like on the data, before the first step.
        weigh (Callable | None): from a batch's whole reference (full view ``[T, C]``, position ``[T]``, row ``[T]``) to
            factors of the constraint's weights, ``[T]``.
        penalty (Callable | None): a term of the trained weights, added once an optimiser step, before clipping: (name of
            a module, its trained weights, whole, under the backbone's names) to a scalar. The same on any number of
            processes.
        before_step (Callable[[Step], None] | None): told the rows of each step before it is computed; what it keeps of them
            belongs into ``state``.
        after_step (Callable[[dict[str, float]], None] | None): given the step's terms, as they count in the loss and equal on
            all ranks; may change the coefficients.
        stream (Stream | None): more rows.
        state (Stateful | None): what a resumption restores, such as a controller's.
        finish (Finish | None): given (A, B) of each module of the finished adapter, under Hugging Face's names, returns those
            that are exported.
    """

    settings: dict[str, Any]
    terms: Callable[[Chunk], dict[str, torch.Tensor]]
    coefficients: dict[str, float]
    metrics: tuple[str, ...] = ()
    reading: Reading = field(default_factory=Nothing)
    views: tuple[View, ...] = ()
    response_only_bos: bool = True
    response_only_tokens: int | None = None
    notes: tuple[str, ...] = ()
    report: Callable[[Iterable[tuple[torch.Tensor, torch.Tensor]]], list[str]] | None = None
    weigh: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    penalty: Callable[[str, dict[str, torch.Tensor]], torch.Tensor] | None = None
    before_step: Callable[[Step], None] | None = None
    after_step: Callable[[dict[str, float]], None] | None = None
    stream: Stream | None = None
    state: Stateful | None = None
    finish: Finish | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all terms, in the order in which :meth:`loss` returns them."""
        return (*self.coefficients, *self.metrics)

    def loss(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients times terms (scalar, differentiable), and all terms, detached ``[len(names)]``."""
        terms = self.terms(chunk)
        loss = sum((factor * terms[name] for name, factor in self.coefficients.items()), start=chunk.ce.new_zeros(()))
        return loss, torch.stack([terms[name] for name in self.names]).detach()

    def total(self, terms: Mapping[str, float]) -> float:
        """The loss, from the terms' means."""
        return sum(factor * terms[name] for name, factor in self.coefficients.items())
