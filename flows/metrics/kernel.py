"""Maximum mean discrepancy between two sets (Gretton et al. 2012), unbiased.

MMD^2 = E k(X, X') + E k(Y, Y') - 2 E k(X, Y), the first two over pairs of different samples. In
expectation it is zero between sets of one distribution, so a value may be a little below zero; of a
set and itself it is about -2 / n.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flows.metrics.sets import check_sets

# Bandwidths of the mixture, in medians of the distance between two samples.
BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
# Samples of each set that the median is taken from.
MEDIAN_SAMPLES = 1000

# (n, d) and (m, d) float64 -> (n, m)
Kernel = Callable[[Tensor, Tensor], Tensor]


def gaussian_mmd(x: Tensor, y: Tensor, *, chunk: int) -> float:
    """MMD^2 with the mean of Gaussian kernels exp(-|a - b|^2 / 2 b^2) of five bandwidths.

    x: (n, ...), y: (m, ...) of the same shape but for the number of samples
    chunk: rows of the kernel matrix held at a time
    """
    x, y = _flat(x), _flat(y)
    squared = median_distance(x, y) ** 2

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = torch.cdist(a, b).square_()
        terms = [torch.exp(distance / (-2 * squared * width**2)) for width in BANDWIDTHS]
        return torch.stack(terms).mean(0)

    return _unbiased(x, y, kernel, chunk)


def polynomial_mmd(x: Tensor, y: Tensor, *, chunk: int) -> float:
    """MMD^2 with the kernel (a b / d + 1)^3 of d features: of Inception's this is KID (Bińkowski et
    al. 2018)."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    return _unbiased(_flat(x), _flat(y), kernel, chunk)


def median_distance(x: Tensor, y: Tensor) -> float:
    """Median distance between different samples of both sets, from some of them evenly chosen.

    Raises ValueError for a set of none, or where the median is 0.
    """
    check_sets(x, y)
    some = torch.cat([part[:: -(-len(part) // MEDIAN_SAMPLES)] for part in (_flat(x), _flat(y))])
    median: float = torch.pdist(some).median().item()
    if median == 0:
        raise ValueError("half of the samples are the same, so their distances have no scale")
    return median


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1).double()


def _unbiased(x: Tensor, y: Tensor, kernel: Kernel, chunk: int) -> float:
    if len(x) < 2 or len(y) < 2:
        raise ValueError(f"pairs of samples need two of them; there are {len(x)} and {len(y)}")
    between = _sum(x, y, kernel, chunk) / (len(x) * len(y))
    within = [
        (_sum(a, a, kernel, chunk) - _diagonal(a, kernel, chunk)) / (len(a) * (len(a) - 1))
        for a in (x, y)
    ]
    value: float = (within[0] + within[1] - 2 * between).item()
    return value


def _sum(x: Tensor, y: Tensor, kernel: Kernel, chunk: int) -> Tensor:
    return torch.stack([kernel(rows, y).sum() for rows in x.split(chunk)]).sum()


def _diagonal(x: Tensor, kernel: Kernel, chunk: int) -> Tensor:
    """Sum of k(a, a) as the matrix has it, rounding included."""
    pieces = [
        kernel(rows, x[start : start + len(rows)]).diagonal().sum()
        for start, rows in zip(range(0, len(x), chunk), x.split(chunk), strict=True)
    ]
    return torch.stack(pieces).sum()
