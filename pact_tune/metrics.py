"""The terms of optimiser steps, kept on the device until somebody wants to read them."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from pact_tune.errors import UserError


class Interval:
    """Terms summed over positions, step by step, of one rank.

    Args:
        names (Sequence[str]): of the terms.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._steps: list[tuple[int, list[int], torch.Tensor]] = []

    def add(self, number: int, rows: list[int], terms: torch.Tensor) -> None:
        """Keeps one step.

        Args:
            number (int): of the step, counted from 1.
            rows (list[int]): of the global batch.
            terms (torch.Tensor): this rank's sums, ``[len(names)]``.
        """
        self._steps.append((number, rows, terms))

    @property
    def rows(self) -> list[int]:
        """The rows of all steps."""
        return [row for _, rows, _ in self._steps for row in rows]

    def means(self, tokens: Callable[[list[int]], float]) -> dict[str, float]:
        """Means over the tokens of all ranks; the one place where the loop waits for the device.

        Args:
            tokens (Callable[[list[int]], float]): trained tokens of some rows.

        Returns:
            dict[str, float]: equal on all ranks.

        Raises:
            UserError: names the first step whose terms are not finite, and its rows.
        """
        terms = torch.stack([terms for _, _, terms in self._steps])
        if dist.is_initialized():
            dist.all_reduce(terms)
        terms = terms.cpu()
        for of_step, (number, rows, _) in zip(terms, self._steps, strict=True):
            if not of_step.isfinite().all():
                values = ", ".join(f"{name} {value}" for name, value in zip(self.names, of_step.tolist(), strict=True))
                more = " and more" if len(rows) > 8 else ""
                raise UserError(
                    f"The loss is not finite at step {number} ({values}), on rows {', '.join(map(str, rows[:8]))}{more} of the "
                    "tokenized data: nothing of it is saved; lower optimizer.lr or the strength in section loss, set "
                    "clip_grad_norm, or look at these rows."
                )
        return dict(zip(self.names, (terms.sum(0) / tokens(self.rows)).tolist(), strict=True))
