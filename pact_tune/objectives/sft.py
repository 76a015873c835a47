"""Plain supervised fine-tuning."""

from pact_tune.objectives.base import Chunk, Context, Objective


def sft(context: Context) -> Objective:
    """Cross-entropy on the response tokens, without a constraint.

    Args:
        context (Context): of the run.

    Returns:
        Objective: "ce".
    """

    def terms(chunk: Chunk) -> dict:
        return {"ce": chunk.ce}

    return Objective(
        settings={"method": "sft", "constrained": False},
        terms=terms,
        coefficients={"ce": 1.0},
        notes=("Objective: plain SFT, without a constraint.",),
    )
