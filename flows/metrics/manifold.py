"""Precision and recall: are samples where the real data is, and is all of it there?

Kynkäänniemi et al. 2019: the manifold of a set is the union of balls around its members, each as
large as the distance to the k-th nearest other member. Naeem et al. 2020: density and coverage, less
moved by outliers among the real data.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Manifold:
    """precision: share of samples inside some ball of real data; recall: share of real data inside some
    ball of samples; density: balls of real data around a sample, over k, in the mean; coverage: share
    of balls of real data with a sample inside.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(samples: Tensor, real: Tensor, *, neighbours: int, chunk: int) -> Manifold:
    """samples: (n, d) features, real: (m, d); each more than `neighbours` (3 as published).

    chunk: rows of the distance matrix held at a time
    All are nan where a number of either set is not finite.
    Raises ValueError if there are too few.
    """
    if min(len(samples), len(real)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours of each need more than {len(samples)} and {len(real)} features"
        )
    samples, real = samples.flatten(1).double(), real.flatten(1).double()
    if not (samples.isfinite().all() and real.isfinite().all()):
        return Manifold(math.nan, math.nan, math.nan, math.nan)
    around_real = _radii(real, neighbours, chunk)
    around_samples = _radii(samples, neighbours, chunk)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    inside, recalled, balls = 0.0, torch.zeros_like(covered), 0.0
    for rows, radius in zip(samples.split(chunk), around_samples.split(chunk), strict=True):
        distance = _distance(rows, real)
        within = distance <= around_real
        inside += within.any(1).sum().item()
        balls += within.sum().item()
        covered |= within.any(0)
        recalled |= (distance <= radius[:, None]).any(0)
    return Manifold(
        precision=inside / len(samples),
        recall=recalled.double().mean().item(),
        density=balls / (neighbours * len(samples)),
        coverage=covered.double().mean().item(),
    )


def _radii(x: Tensor, neighbours: int, chunk: int) -> Tensor:
    """(n,) distance to the k-th nearest other; the nearest of all is the sample itself."""
    pieces = [_distance(rows, x).kthvalue(neighbours + 1, dim=1).values for rows in x.split(chunk)]
    return torch.cat(pieces)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    # By differences: by products, a sample would lie beside itself.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
