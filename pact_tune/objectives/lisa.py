"""Lisa (arXiv 2405.18641): training alternates between alignment data and the user's, and neither may drift far from the other."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch

from pact_tune.config import AlignmentSettings, Count, Seed, Weight
from pact_tune.conversations import Conversation
from pact_tune.data import chat_dataset
from pact_tune.objectives.base import Chunk, Context, Objective, Step, Stream
from pact_tune.stamp import data_fingerprint


def lisa(
    context: Context,
    alignment: Annotated[dict[str, Any], AlignmentSettings],
    k1: Count = 100,
    k2: Count = 900,
    rho: Weight = 1.0,
    seed: Seed = 0,
) -> Objective:
    """Cross-entropy on alignment rows for k1 steps, then on the user's for k2, and so on; a proximal term joins the two.

    Within a state the loss has rho / 2 times the squared distance of the trained weights from where the other state left
    them. The last block of an epoch may have fewer than k2 steps; its share of alignment steps stays k1 : k2.

    Args:
        context (Context): of the run.
        alignment (dict[str, Any]): the alignment data, such as what `pact anchors` writes.
        k1 (int): optimiser steps on alignment rows.
        k2 (int): optimiser steps on the user's rows.
        rho (float): of the proximal term; 0 is alternating SFT.
        seed (int): of the alignment rows' order.

    Returns:
        Objective: "ce", the second stream, the proximal term, and its state.

    Raises:
        UserError: alignment data that cannot be read.
    """
    rows: Any = alignment  # a mapping; the annotation is what its keys are checked by
    data = chat_dataset(context.tokenizer, **rows)
    states = BiState(data.conversations, k1, k2, rho, seed)

    def terms(chunk: Chunk) -> dict[str, torch.Tensor]:
        return {"ce": chunk.ce}

    return Objective(
        settings={
            "method": "lisa", "constrained": True, "k1": k1, "k2": k2, "rho": rho, "seed": seed,
            "alignment": {**rows, "fingerprint": data_fingerprint(data.conversations)},
        },
        terms=terms,
        coefficients={"ce": 1.0},
        before_step=states.before_step,
        penalty=states.penalty,
        stream=Stream(data.conversations, states.arrange),
        state=states,
        notes=(f"Objective: Lisa, {k1} steps on alignment data to {k2} on yours.", *(f"Alignment: {c}" for c in data.counts)),
    )  # fmt: skip


class BiState:
    """Which of the two states a run is in, and where the other one left the trained weights.

    That is where they were at the last switch, so one snapshot does; it is whole on every process.

    Args:
        rows (Sequence[Conversation]): alignment data.
        k1 (int): steps on it.
        k2 (int): steps on the user's data.
        rho (float): of the proximal term.
        seed (int): of the order of ``rows``.
    """

    def __init__(self, rows: Sequence[Conversation], k1: int, k2: int, rho: float, seed: int) -> None:
        self.rows, self.k1, self.k2, self.rho, self.seed = rows, k1, k2, rho, seed
        self.first = 0
        self.aligning: bool | None = None  # before the first step
        self.switching = False
        self.other: dict[str, dict[str, torch.Tensor]] = {}

    def arrange(self, steps: list[Step], first: int, epoch: int) -> list[Step]:
        """Puts alignment steps before each k2 of the user's; see :class:`pact_tune.objectives.base.Stream`."""
        self.first = first
        drawn = self._drawn(epoch)
        arranged: list[Step] = []
        for start in range(0, len(steps), self.k2):
            block = steps[start : start + self.k2]
            for _ in range(math.ceil(self.k1 * len(block) / self.k2)):
                arranged.append([first + next(drawn) for _ in steps[0]])
            arranged += block
        return arranged

    def _drawn(self, epoch: int) -> Iterator[int]:
        """Alignment rows without end, each once before any comes again."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        while True:
            yield from torch.randperm(len(self.rows), generator=generator).tolist()

    def before_step(self, step: Step) -> None:
        aligning = step[0] >= self.first
        self.switching = aligning is not self.aligning
        self.aligning = aligning

    def penalty(self, module: str, trained: dict[str, torch.Tensor]) -> torch.Tensor:
        """rho / 2 times the squared distance from the other state's weights; at a switch these are the ones at hand."""
        if self.switching:
            self.other[module] = {name: weight.detach().clone() for name, weight in trained.items()}
        distances = [
            (weight.float() - self.other[module][name].to(weight.device).float()).square().sum()
            for name, weight in trained.items()
        ]
        return self.rho / 2 * torch.stack(distances).sum()

    def state_dict(self) -> dict[str, Any]:
        other = {module: {name: weight.cpu() for name, weight in kept.items()} for module, kept in self.other.items()}
        return {"aligning": self.aligning, "other": other}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.aligning, self.other = state["aligning"], state["other"]
