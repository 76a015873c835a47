"""A budget for a constraint: the user says how far the student may go, and the strength is found during the run."""

import math
from typing import Any

SMOOTHING = 0.9  # of the term's running mean: a step sees few rows
RATE = 0.05  # largest change of log(strength) in a step: tenfold in 46
LEAST, MOST = 1e-3, 1e4  # the strength stays between these


class Budget:
    """Dual ascent in log space: the strength grows while the term's running mean is over the budget, and falls below it.

    After each step log(strength) moves by 0.05 times log(mean / budget), the latter held between -1 and 1. Where the
    two are equal nothing moves, whatever their scale.

    Args:
        coefficients (dict[str, float]): of the objective; the entry ``name`` is changed in place.
        name (str): of the term.
        budget (float): what its mean over tokens may be, in the term's unit.
    """

    def __init__(self, coefficients: dict[str, float], name: str, budget: float) -> None:
        self.coefficients, self.name, self.budget = coefficients, name, budget
        self.mean: float | None = None

    def after_step(self, terms: dict[str, float]) -> None:
        """Given the step's means, the same on all ranks."""
        value = terms[self.name]
        self.mean = value if self.mean is None else SMOOTHING * self.mean + (1 - SMOOTHING) * value
        excess = math.log(max(self.mean, 1e-12) / self.budget)
        strength = self.coefficients[self.name] * math.exp(RATE * max(-1.0, min(1.0, excess)))
        self.coefficients[self.name] = max(LEAST, min(MOST, strength))

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]
