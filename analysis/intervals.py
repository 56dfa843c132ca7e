"""Means and differences with 95 % intervals: over images, over seeds, paired where they share them."""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
MAX_KEPT = 12_500  # values, of which four sets of resamples are 100 MB
Z95 = 1.959964  # 97.5 % quantile of the normal distribution
# 97.5 % quantiles of Student's t distribution with 1 to 10 degrees of freedom (any table of it).
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share observed on n images (Wilson, JASA 1927).

    It covers the chance in which images were drawn, not the chance in training: for that, repeat with other seeds.
    """
    if n <= 0 or not math.isfinite(accuracy):
        return math.nan, math.nan
    centre = (accuracy + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + Z95**2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def student_t95(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution."""
    if freedom <= len(_T95):
        return _T95[freedom - 1]
    # Fisher's expansion about the normal quantile, exact to three digits beyond the table.
    return Z95 + (Z95**3 + Z95) / (4 * freedom) + (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * freedom**2)


def _finite(values: Sequence[float] | NDArray[np.floating]) -> tuple[NDArray[np.float64], float]:
    """Return those values that are numbers, and their mean; NaN of none."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    return finite, float(finite.mean()) if len(finite) else math.nan


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """Return mean and 95 % interval of independent values, by Student's t; NaN limits for fewer than two."""
    finite, mean = _finite(values)
    if len(finite) < 2:
        return mean, math.nan, math.nan
    half = student_t95(len(finite) - 1) * float(finite.std(ddof=1)) / math.sqrt(len(finite))
    return mean, mean - half, mean + half


def bootstrap_interval(values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Return mean and 95 % interval of values of independent images, by the percentile bootstrap; NaN is left out.

    2,000 resamples, seeded (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 13). Given differences of
    two maps of the same images, it is the paired bootstrap.
    """
    finite, mean = _finite(values)
    if len(finite) < 2:
        return mean, math.nan, math.nan
    resamples = _kept_resamples(len(finite)) if len(finite) <= MAX_KEPT else _resamples(len(finite))
    means = np.concatenate([counts @ finite for counts in resamples]) / len(finite)
    low, high = np.quantile(means, (0.025, 0.975))
    return mean, float(low), float(high)


def _resamples(n: int) -> Iterator[NDArray[np.integer]]:
    """Yield how often each of n values is drawn in each resample, (some, n) of the 2,000 at a time.

    All at once would be gigabytes for a hundred thousand values. However many at a time, the draws are the same.
    """
    rng = np.random.default_rng(0)
    rows = max(1, 1_000_000 // n)
    for first in range(0, NUM_RESAMPLES, rows):
        yield rng.multinomial(n, np.full(n, 1 / n), size=min(rows, NUM_RESAMPLES - first))


@functools.lru_cache(maxsize=4)
def _kept_resamples(n: int) -> list[NDArray[np.integer]]:
    # Nothing is drawn as often as 256 times: a byte does.
    return [counts.astype(np.uint8) for counts in _resamples(n)]


def paired_difference(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Return the difference in accuracy of two networks on the same images, with its 95 % interval.

    Args:
        a: (N,) bool, whether the first network is right on each image.
        b: (N,) bool, the second on the same images.
    """
    return mean_interval(a.astype(np.float64) - b.astype(np.float64))


def difference_of_means(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Return the difference of two groups' means with its 95 % interval (Welch, Biometrika 1947).

    The degrees of freedom are those of the smaller group, which errs on the wide side. NaN limits where a group has
    fewer than two values.
    """
    difference = float(np.mean(a) - np.mean(b))
    freedom = min(len(a), len(b)) - 1
    if freedom < 1:
        return difference, math.nan, math.nan
    half = student_t95(freedom) * math.sqrt(np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b))
    return difference, difference - half, difference + half


def paired_over_seeds(a: pd.Series, b: pd.Series) -> tuple[float, float, float, int]:
    """Return the difference of two groups' means with its 95 % interval, and of how many seeds that is.

    What the seeds have in common (the first weights, the order of images) is taken out where there are at least two
    shared ones: the interval is Student's t over their differences. Else it is Welch's over both groups' seeds. It is
    not the bootstrap: of five values its 95 % interval covers 84 %.

    Args:
        a: a value of each trial, indexed by its seed; several of one seed are averaged.
        b: likewise, of the other group.
    """
    a, b = (values.dropna().groupby(level=0).mean() for values in (a, b))
    shared = a.index.intersection(b.index)
    if len(shared) > 1:
        return *mean_interval((a[shared] - b[shared]).to_numpy(dtype=np.float64)), len(shared)
    return *difference_of_means(a.to_list(), b.to_list()), min(len(a), len(b))
