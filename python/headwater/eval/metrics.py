"""Statistics of the evaluation: percentiles, and bootstrap intervals of what is measured per window or question.

Needs NumPy only.
"""

import math
from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import numpy as np

RESAMPLES = 2000
MAX_INDICES = 1 << 22  # of one slice of resamples


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its interval; equal to it where there is one sample only."""

    value: float
    low: float
    high: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value under which `share` percent (0 to 100) of the values lie, interpolated linearly. NaN: of nothing."""
    ordered = np.sort(np.asarray(values, dtype=np.float64).ravel())
    if not ordered.size:
        return math.nan
    place = share / 100 * (ordered.size - 1)
    below = math.floor(place)
    above = min(below + 1, ordered.size - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


def bootstrap(differences: Sequence[float], *, seed: int, confidence: float = 0.95, resamples: int = RESAMPLES,
              transform: Callable[[float], float] = float, groups: Optional[Sequence[str]] = None) -> Interval:
    """Percentile interval of transform(mean of differences). Paired: a difference is one window's or one question's, policy
    minus dense, so that what both share does not widen it.

    groups: one name a difference; differences of a group (questions of one context) are drawn together. The same seed and
    numbers give the same interval. transform must not fall.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"differences have shape {values.shape}; at least one number is wanted")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence {confidence} or resamples {resamples} is out of range")
    names = list(range(values.size)) if groups is None else list(groups)
    if len(names) != values.size:
        raise ValueError(f"{len(names)} groups for {values.size} differences")
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    group = np.array([place[name] for name in names])
    sums, sizes = np.bincount(group, weights=values), np.bincount(group)
    draw = np.random.default_rng(seed)
    means = []
    step = max(1, MAX_INDICES // sums.size)
    for first in range(0, resamples, step):
        chosen = draw.integers(0, sums.size, (min(step, resamples - first), sums.size))
        means.append(sums[chosen].sum(axis=1) / sizes[chosen].sum(axis=1))
    means = np.concatenate(means)
    tail = 50 * (1 - confidence)
    low, high = (transform(percentile(means, share)) for share in (tail, 100 - tail))
    return Interval(transform(float(values.mean())), low, high)


def perplexity(mean_nll: float) -> float:
    """exp of a mean negative log-likelihood in nats; infinity where it is too large."""
    return math.exp(mean_nll) if mean_nll < 700 else math.inf


def relative_perplexity(difference: float) -> float:
    """Perplexity over dense's, less one, of a difference of mean negative log-likelihoods."""
    return perplexity(difference) - 1
