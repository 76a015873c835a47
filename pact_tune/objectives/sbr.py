"""SBR (arXiv 2605.05995): the hidden state with which the model meets harmful prompts stays where it was."""

import torch

from pact_tune.config import Count, PathText, Text, Weight
from pact_tune.conversations import Conversation, render_prompt
from pact_tune.objectives.base import Chunk, Context, Objective, Step, Stream
from pact_tune.prompts import column as texts_of
from pact_tune.prompts import read_prompts
from pact_tune.reference.readings import Hidden


def sbr(
    context: Context, prompts: PathText, alpha: Weight = 50.0, column: Text = "prompt", per_step: Count = 8
) -> Objective:
    """Cross-entropy + alpha * mean squared distance of the last hidden state at the end of each anchor prompt.

    The state is the one before the output head, after the last norm, at the last token of the chat template's assistant
    header; the frozen model's is stored once. Each step has some anchors beside its rows.

    Args:
        context (Context): of the run.
        prompts (str): file or data set of harmful prompts.
        alpha (float): weight of the distance.
        column (str): of the prompts.
        per_step (int): anchors in each step; where there are more they take turns.

    Returns:
        Objective: "ce" + alpha * "sbr", and a second stream, on which alone the constraint is.

    Raises:
        UserError: prompts that cannot be read.
    """
    rows = [_anchor(context, text) for text in texts_of(read_prompts(prompts), column, prompts)]
    each = min(per_step, len(rows))

    def arrange(steps: list[Step], first: int, epoch: int) -> list[Step]:
        starts = (each * (epoch * len(steps) + i) for i in range(len(steps)))
        return [
            [*step, *(first + (start + j) % len(rows) for j in range(each))]
            for step, start in zip(steps, starts, strict=True)
        ]

    def terms(chunk: Chunk) -> dict[str, torch.Tensor]:
        distance = (chunk.student.float() - chunk.reference["full"].float()).square().mean(-1)
        return {"ce": chunk.ce, "sbr": (distance * chunk.weight).sum()}

    return Objective(
        settings={"method": "sbr", "constrained": True, "alpha": alpha, "per_step": per_step, "anchors": len(rows)},
        terms=terms,
        coefficients={"ce": 1.0, "sbr": alpha},
        reading=Hidden(),
        views=("full",),
        stream=Stream(rows, arrange, alone=True),
        notes=(f"Objective: SBR, {each} of {len(rows)} anchor prompts in each step.",),
    )


def _anchor(context: Context, prompt: str) -> Conversation:
    """A prompt whose last token's state is read: positions are those that predict a response, so one token stands for it."""
    ids = render_prompt(context.tokenizer, [{"role": "user", "content": prompt}])
    return Conversation([*ids, ids[-1]], [(len(ids), len(ids) + 1)], ce_weight=0.0)
