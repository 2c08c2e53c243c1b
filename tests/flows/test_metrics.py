"""Distances between sample sets are zero where they must be and equal their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from flows.metrics.energy import energy_distance
from flows.metrics.wasserstein import sliced_wasserstein


def gaussian(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def brute_energy(x: Tensor, y: Tensor) -> float:
    def mean(a: Tensor, b: Tensor) -> float:
        pairs = [math.dist(p.tolist(), q.tolist()) for p in a.flatten(1) for q in b.flatten(1)]
        return math.fsum(pairs) / len(pairs)

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_energy_distance_is_its_definition(chunk: int) -> None:
    x, y = (gaussian(n, 2, 3, seed=n).double() + 1000.0 + n for n in (13, 9))
    # A product leaves 1e-8 of the spread of the samples as their distance to themselves.
    assert energy_distance(x, y, chunk=chunk) == pytest.approx(brute_energy(x, y), rel=1e-7)


def test_energy_distance_of_gaussians_is_the_closed_form() -> None:
    shift = 1.5
    x, y = gaussian(3000, 1), gaussian(3000, 1, seed=1) + shift
    # E|N(m, s^2)| = s sqrt(2 / pi) exp(-m^2 / 2 s^2) + m erf(m / s sqrt 2), here s^2 = 2
    between = 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    expected = 2 * between - 4 / math.sqrt(math.pi)
    assert energy_distance(x, y, chunk=512) == pytest.approx(expected, rel=0.05)


def test_two_sets_of_one_distribution_are_as_far_as_the_v_statistic_says() -> None:
    n, m = 400, 100
    distances = [
        energy_distance(gaussian(n, 8, seed=2 * k), gaussian(m, 8, seed=2 * k + 1), chunk=400)
        for k in range(5)
    ]
    pairs = gaussian(n, 8) - gaussian(n, 8, seed=1)
    expected = pairs.norm(dim=1).mean().item() * (1 / n + 1 / m)
    assert sum(distances) / 5 == pytest.approx(expected, rel=0.1)


def test_sliced_wasserstein_of_a_shift_is_the_shift_over_root_dimensions() -> None:
    x = gaussian(50, 3, 4)
    shift = gaussian(1, 3, 4, seed=1)
    distance = sliced_wasserstein(x, x + shift, projections=4096, seed=0)
    assert distance == pytest.approx(shift.norm().item() / math.sqrt(12), rel=0.05)


def test_sliced_wasserstein_in_one_dimension_pairs_sorted_samples() -> None:
    x, y = gaussian(40, 1), gaussian(40, 1, seed=1)
    expected = (x.sort(dim=0).values - y.sort(dim=0).values).square().mean().sqrt().item()
    assert sliced_wasserstein(x, y, projections=3, seed=0) == pytest.approx(expected, rel=1e-6)


def test_unequal_counts_are_compared_as_distributions() -> None:
    x, y = gaussian(12, 5), gaussian(20, 5, seed=1)
    expected = sliced_wasserstein(x.repeat(5, 1), y.repeat(3, 1), projections=16, seed=0)
    assert sliced_wasserstein(x, y, projections=16, seed=0) == pytest.approx(expected, rel=1e-12)
    assert sliced_wasserstein(x, x.repeat(3, 1), projections=16, seed=0) == 0.0


def energy(x: Tensor, y: Tensor) -> float:
    return energy_distance(x, y, chunk=64)


def sliced(x: Tensor, y: Tensor) -> float:
    return sliced_wasserstein(x, y, projections=64, seed=0)


@pytest.mark.parametrize("distance", [energy, sliced])
class TestEveryDistance:
    def test_is_zero_between_a_set_and_itself_in_any_order(self, distance) -> None:
        x = gaussian(100, 6)
        assert distance(x, x) == pytest.approx(0.0, abs=1e-12)
        assert distance(x, x[torch.randperm(100)]) == pytest.approx(0.0, abs=1e-7)

    def test_is_symmetric_and_repeatable(self, distance) -> None:
        x, y = gaussian(30, 6), gaussian(50, 6, seed=1)
        assert distance(x, y) == distance(x, y)
        assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-12)

    def test_grows_with_added_noise(self, distance) -> None:
        x, y, noise = gaussian(300, 6), gaussian(300, 6, seed=1), gaussian(300, 6, seed=2)
        values = [distance(x, y + scale * noise) for scale in (0.0, 0.5, 1.0, 2.0)]
        assert values == sorted(values)
        assert values[1] > 1.1 * values[0]
