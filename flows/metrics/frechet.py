"""Fréchet distance between the Gaussians fitted to two sets of features (Heusel et al. 2017).

|mu_1 - mu_2|^2 + tr(S_1 + S_2) - 2 sum sqrt eig(S_1^(1/2) S_2 S_1^(1/2)), all in float64 with symmetric
eigenvalues: no complex square root, nothing that may fail to converge.

It is named after its features, `FD-<features>`: only Inception's make an "FID". The estimate is biased
by about features / samples; give at least ten samples for each feature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums over samples, so that those of parts of a set add up to those of the set.

    count: () float64; total: (d,) float64 of features; products: (d, d) float64 of their pairs
    """

    count: Tensor
    total: Tensor
    products: Tensor

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """features: (n, d)"""
        x = features.double()
        return Moments(x.new_tensor(float(len(x))), x.sum(0), x.T @ x)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.total + other.total, self.products + other.products
        )

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """(d, d), unbiased; raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples; there are {int(self.count)}")
        centred = self.products - torch.outer(self.total, self.total) / self.count
        return centred / (self.count - 1)


def frechet_distance(x: Moments, y: Moments) -> float:
    """The squared distance, as it is always reported; not a number if any moment is not finite."""
    first, second = x.covariance, y.covariance
    apart = (x.mean - y.mean).square().sum()
    spread = first.trace() + second.trace()
    if not (apart + spread).isfinite():
        return float("nan")
    root = _root(first)
    shared = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0.0).sqrt().sum()
    distance: float = (apart + spread - 2 * shared).item()
    return distance


def _root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    return root
