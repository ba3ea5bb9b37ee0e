"""Confidence intervals of a few seeds, and the smallest difference that they could have shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy import stats

LEVEL, POWER = 0.95, 0.80


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, by Student's t."""

    mean: float
    low: float
    high: float
    detectable: float
    """The smallest true difference that this many seeds would have told from 0 with a probability of 80 %."""
    p: float
    """Two-sided, of a mean of 0."""

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    def unsigned(self) -> str:
        return f"{self.mean:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(values: Sequence[float]) -> Interval:
    """The 95 % interval of the mean of `values`, such as paired differences by seed."""
    centre, error = mean(values), stdev(values) / math.sqrt(len(values))
    quantile = stats.t(len(values) - 1).ppf
    half = quantile((1 + LEVEL) / 2) * error
    detectable = half + quantile(POWER) * error
    p = 2 * stats.t(len(values) - 1).sf(abs(centre) / error) if error else float(centre == 0)
    return Interval(centre, centre - half, centre + half, detectable, p)


def paired(own: Sequence[float], other: Sequence[float]) -> Interval:
    """The interval of `own - other`, seed by seed."""
    return interval([a - b for a, b in zip(own, other, strict=True)])
