"""Sliced Wasserstein distance between two sets of samples (Bonneel et al. 2015)."""

import torch
from torch import Tensor

from flows.metrics.sets import check_sets
from flows.randomness import Draw


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int, seed: int) -> float:
    """Root mean square over random directions of the 1-D Wasserstein-2 distance, in float64.

    For sets that differ by a shift a in d dimensions its square is |a|^2 / d in expectation.

    x: (n, ...), y: (m, ...) of the same shape but for the number of samples; the counts may differ
    projections: random unit directions, the same for a seed on every device
    Raises ValueError for a set of none.
    """
    check_sets(x, y)
    x, y = x.flatten(1).double(), y.flatten(1).double()
    index = torch.arange(projections, device=x.device)
    directions = Draw(seed, 0, index).normal("sliced_wasserstein", (x.shape[1],)).double()
    directions = torch.nn.functional.normalize(directions, dim=1)
    return _squared_1d(x @ directions.T, y @ directions.T).mean().sqrt().item()


def _squared_1d(x: Tensor, y: Tensor) -> Tensor:
    """(projections,) integral of (quantile of x - quantile of y)^2, exact for any two counts.

    Quantile functions step at multiples of 1/n and 1/m, which are integers in units of 1/(n m).

    x: (n, projections), y: (m, projections)
    """
    n, m = len(x), len(y)
    steps_x = torch.arange(n + 1, device=x.device) * m
    steps_y = torch.arange(m + 1, device=x.device) * n
    edges = torch.cat((steps_x, steps_y)).unique()
    start, length = edges[:-1], edges.diff().double() / (n * m)
    gap = x.sort(dim=0).values[start // m] - y.sort(dim=0).values[start // n]
    return gap.square().mul(length[:, None]).sum(dim=0)


def exact_wasserstein(x: Tensor, y: Tensor) -> float:
    """Wasserstein-2 distance: the root of the smallest mean squared distance of any pairing.

    By assignment, which takes the cube of n: for at most a few thousand samples.

    x, y: (n, ...) of the same shape, finite; raises ValueError if they are not
    """
    from scipy.optimize import linear_sum_assignment

    check_sets(x, y)
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("samples with a number that is not finite make no pairs")
    if x.shape != y.shape:
        raise ValueError(f"samples of shape {tuple(x.shape)} and {tuple(y.shape)} make no pairs")
    cost = torch.cdist(x.flatten(1).double(), y.flatten(1).double()).square()
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    pairs: Tensor = (x.flatten(1).double()[rows] - y.flatten(1).double()[columns]).square().sum(1)
    return pairs.mean().sqrt().item()
