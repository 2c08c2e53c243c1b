"""Energy distance between two sets of samples (Székely and Rizzo 2013)."""

import torch
from torch import Tensor

from flows.metrics.sets import check_sets


def energy_distance(x: Tensor, y: Tensor, *, chunk: int) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| with Euclidean distances, in float64.

    The V-statistic: a sample's zero distance to itself is counted in the means, so the value is
    never negative, is zero for equal sets, and between two finite sets of one distribution is in
    expectation E|X - X'| (1 / n + 1 / m).

    A number that is not finite in either set makes the result not a number.

    x: (n, ...), y: (m, ...) of the same shape but for the number of samples
    chunk: rows of the distance matrix held at a time
    Raises ValueError for a set of none.
    """
    check_sets(x, y)
    x, y = x.flatten(1).double(), y.flatten(1).double()
    # Distances do not change, and the products below cancel less.
    center = torch.cat((x, y)).mean(dim=0)
    x, y = x - center, y - center
    between, within_x, within_y = (_mean_distance(a, b, chunk) for a, b in ((x, y), (x, x), (y, y)))
    distance: float = (2.0 * between - within_x - within_y).clamp(min=0.0).item()
    return distance


def _mean_distance(x: Tensor, y: Tensor, chunk: int) -> Tensor:
    """() mean Euclidean distance of all pairs, by |a - b|^2 = |a|^2 - 2 a b + |b|^2."""
    total = x.new_zeros(())
    y_squared = y.square().sum(dim=1)
    for rows in x.split(chunk):
        squared = rows.square().sum(dim=1, keepdim=True) + y_squared
        total += squared.addmm_(rows, y.T, alpha=-2.0).clamp_(min=0.0).sqrt_().sum()
    return total / (len(x) * len(y))
