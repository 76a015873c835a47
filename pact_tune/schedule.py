"""Which rows make up each optimiser step: pure functions of the data's lengths, the seed and the epoch, on every rank alike."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pact_tune.batching import rank_rows
from pact_tune.conversations import Conversation
from pact_tune.errors import UserError
from pact_tune.objectives.base import Step, Stream

BUCKET_STEPS = 50  # steps whose rows are sorted by length together: more pads less, fewer mixes more


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of a run; a last step of an epoch that is not full is trained on like any other.

    Attributes:
        rows (Sequence[Conversation]): of the data, then those of the objective's second stream.
        main (int): how many of them are the data's.
        batch_size (int): rows of a forward on one process.
        world_size (int): processes.
        accumulation (int): forwards a step on each process.
        epochs (int): passes over the data.
        seed (int): of the order.
        shuffle (bool): False keeps the data's order.
        by_length (bool): rows of like lengths share a step.
        max_steps_per_epoch (int | None): shortens epochs.
        stream (Stream | None): arranges the steps anew with the second stream's rows.
    """

    rows: Sequence[Conversation]
    main: int
    batch_size: int
    world_size: int
    accumulation: int
    epochs: int
    seed: int
    shuffle: bool
    by_length: bool
    max_steps_per_epoch: int | None
    stream: Stream | None = None

    def __post_init__(self) -> None:
        if self.main < self.world_size:
            raise UserError(
                f"The data has {self.main} row(s), fewer than the {self.world_size} processes: use fewer processes."
            )

    @functools.cached_property
    def rows_per_step(self) -> int:
        return self.batch_size * self.world_size * self.accumulation

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.tokens) for row in self.rows]

    @functools.cached_property
    def steps_per_epoch(self) -> int:
        return len(self.epoch(0))

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a schedule lives as long as its run
    def epoch(self, epoch: int) -> list[Step]:
        """The steps of an epoch, each as its row numbers.

        Args:
            epoch (int): counted from 0.

        Returns:
            list[Step]: depends on the schedule and the epoch alone.
        """
        order = epoch_order(self.main, self.seed, epoch, self.shuffle)
        if self.by_length:
            order = group_by_length(order, self.lengths, self.rows_per_step, self.seed, epoch)
        steps = [order[start : start + self.rows_per_step] for start in range(0, len(order), self.rows_per_step)]
        steps = steps[: self.max_steps_per_epoch]
        return steps if self.stream is None else self.stream.arrange(steps, self.main, epoch)

    def check_lengths(self, max_seq_len: int, packed: bool) -> None:
        """Raises UserError when a row, or the rows that are packed into one, do not fit into the model.

        Args:
            max_seq_len (int): tokens that the model takes.
            packed (bool): ``batch_size`` rows make one.
        """
        longest = sum(sorted(self.lengths, reverse=True)[: self.batch_size if packed else 1])
        if longest > max_seq_len:
            raise UserError(
                f"The longest row{'s that may be packed have' if packed else ' has'} {longest} tokens, and the model takes "
                f"{max_seq_len}: set dataset.max_seq_len to leave longer ones out."
            )

    @functools.cached_property
    def used(self) -> list[int]:
        """Numbers of the rows that the run uses, in order."""
        return sorted({row for epoch in range(self.epochs) for step in self.epoch(epoch) for row in step})

    def divisor(self, step: Step) -> float:
        """What a step's sums are divided by: its trained tokens; by length, those of a mean step.

        By length, a step of short rows must not weigh as much as one of long rows.

        Args:
            step (Step): row numbers.

        Returns:
            float: by the weights of the cross-entropy; of the constraint where nothing is trained.
        """
        if self.by_length and self.stream is None:
            return self.tokens(range(self.main)) * min(1, self.rows_per_step / self.main)
        return self.tokens(step)

    def constraint_factor(self, step: Step) -> float:
        """What the constraint's weights are multiplied by, so that of a stream that has it alone the mean is taken.

        Sums are divided by a step's trained tokens, and such a stream has none.
        """
        if self.stream is None or not self.stream.alone:
            return 1.0
        constrained = sum(self.rows[row].num_response_tokens * self.rows[row].weight for row in step)
        return self.tokens(step) / constrained if constrained else 1.0

    def tokens(self, rows: Sequence[int]) -> float:
        """Response tokens of some rows by the weights of their cross-entropy; by the constraint's where none is trained."""
        trained = sum(self.rows[row].num_response_tokens * self.rows[row].ce_weight for row in rows)
        return trained or sum(self.rows[row].num_response_tokens * self.rows[row].weight for row in rows) or 1.0

    def micro_batches(self, step: Step, rank: int) -> list[list[int]]:
        """The rows of each forward of a step on one rank; a rank may have none in the last.

        The loss of a step does not depend on how it is cut: like lengths together pad least.
        """
        ordered = sorted(step, key=lambda row: self.lengths[row])
        size = self.batch_size * self.world_size
        return [
            rank_rows(ordered[start : start + size], rank, self.world_size) for start in range(0, len(ordered), size)
        ]


def epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """Row numbers in the order of one epoch; depends on the arguments alone, on every rank alike.

    Args:
        num_rows (int): rows of the data set.
        seed (int): of the run.
        epoch (int): counted from 0.
        shuffle (bool): False keeps the data set's order.

    Returns:
        list[int]: a permutation of ``range(num_rows)``.
    """
    if not shuffle:
        return list(range(num_rows))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_rows, generator=generator).tolist()


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], rows_per_step: int, seed: int, epoch: int
) -> list[int]:
    """Regroups an epoch's order so that the rows of a step have like lengths, and little is padded.

    The order is cut into buckets of some steps; inside a bucket rows are sorted by length; then all steps are shuffled.
    A last step that is not full stays the last.

    Args:
        order (Sequence[int]): row numbers, from :func:`epoch_order`.
        lengths (Sequence[int]): tokens of each row of the data set.
        rows_per_step (int): rows of an optimiser step.
        seed (int): of the run.
        epoch (int): counted from 0.

    Returns:
        list[int]: a permutation of ``order`` that depends on the arguments alone.
    """
    bucket = BUCKET_STEPS * rows_per_step
    full = len(order) - len(order) % rows_per_step
    grouped = [
        row
        for start in range(0, full, bucket)
        for row in sorted(order[start : min(start + bucket, full)], key=lambda row: lengths[row])
    ]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    steps = torch.randperm(full // rows_per_step, generator=generator).tolist()
    shuffled = [row for step in steps for row in grouped[step * rows_per_step : (step + 1) * rows_per_step]]
    return shuffled + list(order[full:])
