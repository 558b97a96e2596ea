"""What many clips say together: means and rates with bootstrap confidence intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
BLOCK = 100


class Estimate(NamedTuple):
    """A figure of a corpus and how sure it is."""

    mean: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    clips: int
    """Clips that it comes from."""


def estimate(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """The mean of one value per clip with its percentile bootstrap interval over clips (Efron 1979).

    Clips are drawn, not speakers: where few speakers speak many clips, the interval is too narrow for new speakers.

    Args:
        values: One per clip; NaN where the score is undefined for the clip, which then does not count.
        weights: What a clip counts for, such as its number of words: the result is sum(value * weight) / sum(weight).
        seed: Of the resamples; the same clips always give the same interval.
    """
    scores = np.asarray(values, dtype=np.float64)
    shares = np.ones_like(scores) if weights is None else np.asarray(weights, dtype=np.float64)
    defined = np.isfinite(scores) & (shares > 0)
    scores, shares = scores[defined], shares[defined]
    count = len(scores)
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // BLOCK):  # in blocks, so that ten thousand clips do not need 80 MB
        drawn = generator.integers(count, size=(BLOCK, count))
        means.append((scores * shares)[drawn].sum(1) / shares[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float((scores * shares).sum() / shares.sum()), float(low), float(high), count)
