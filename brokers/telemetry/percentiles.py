"""Percentiles, by the one definition in Sparse."""

from collections.abc import Collection, Sequence

import numpy as np


def percentiles(values: Collection[float], percents: Sequence[float] = (50, 95, 99)) -> dict[str, float]:
    """Nearest-rank percentiles of `values`, named "p50", "p95", ...; all 0.0 where there are no values.

    The p-th percentile is the smallest value that at least p percent of the values do not exceed.
    """
    names = [f"p{percent:g}" for percent in percents]
    if not values:
        return dict.fromkeys(names, 0.0)
    ranks = np.percentile(np.fromiter(values, float, len(values)), percents, method="inverted_cdf")
    return dict(zip(names, map(float, ranks), strict=True))
