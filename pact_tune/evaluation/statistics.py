"""Numbers with their uncertainty: Wilson intervals, exact McNemar, and runs with several seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A count out of all rows.

    Attributes:
        count (int): rows that have it.
        total (int): all rows, at least 1.
    """

    count: int
    total: int

    @property
    def percent(self) -> float:
        return 100.0 * self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in percent."""
        interval = binomtest(self.count, self.total).proportion_ci(CONFIDENCE, method="wilson")
        return 100.0 * interval.low, 100.0 * interval.high


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided McNemar test of two models on the same rows.

    Args:
        first (Sequence[bool]): what the first model did on each row.
        second (Sequence[bool]): what the second did on the same rows.

    Returns:
        float: probability of rows that differ as unevenly or more so if neither model was more likely to; 1 where none
        differs.
    """
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


@dataclass(frozen=True)
class Seeds:
    """One number of several runs that differ in their seed alone.

    Attributes:
        values (tuple[float, ...]): one a run.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for one run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None
