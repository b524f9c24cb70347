"""What can be said of a few runs that differ in the seed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Student's t, 97.5%, by degrees of freedom from 1.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Estimate(NamedTuple):
    """A mean, with its standard error and the number of values; no error of one value."""

    mean: float
    stderr: float | None
    num_values: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, of Student's t: as wide as so few values make it."""
        if self.stderr is None:
            return None
        reach = t_quantile(self.num_values - 1) * self.stderr
        return self.mean - reach, self.mean + reach


def estimate(values: Sequence[float]) -> Estimate:
    """Of at least one value."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, None, 1)
    return Estimate(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n), n)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Mean difference of runs with the same seed, which see the same rows in the same order.

    Args:
        ours: by seed.
        theirs: by seed.

    Returns:
        None if fewer than two seeds are in both.
    """
    common = [seed for seed in ours if seed in theirs]
    return estimate([ours[seed] - theirs[seed] for seed in common]) if len(common) > 1 else None


def t_quantile(freedom: int) -> float:
    """97.5% of Student's t; beyond 30 degrees of freedom by Cornish and Fisher's expansion, right to 0.001."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
