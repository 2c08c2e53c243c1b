"""Distances of features: closed forms, definitions, determinism, and sets that come in parts."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from flows.batch import Batch
from flows.dequantisation import Levels
from flows.metrics.energy import energy_distance
from flows.metrics.features import (
    cosines,
    low_frequencies,
    orthogonal_filters,
    pixels,
    principal_components,
    random_convnet,
)
from flows.metrics.frechet import Moments, frechet_distance
from flows.metrics.kernel import BANDWIDTHS, gaussian_mmd, median_distance, polynomial_mmd
from flows.metrics.manifold import precision_recall
from flows.metrics.mixture import gaussian_mixture_bits
from flows.metrics.wasserstein import exact_wasserstein, sliced_wasserstein
from flows.objectives.likelihood import Likelihood
from flows.randomness import Draw


def gaussian(count: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def frechet(x: Tensor, y: Tensor) -> float:
    return frechet_distance(Moments.of(x), Moments.of(y))


def brute_mmd(x: Tensor, y: Tensor, kernel) -> float:
    def mean(a: Tensor, b: Tensor) -> float:
        values = [
            kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if a is not b or i != j
        ]
        return math.fsum(values) / len(values)

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_mmd_is_its_definition(chunk: int) -> None:
    x, y = gaussian(11, 4), gaussian(7, 4, seed=1) + 0.5
    distances = [math.dist(p, q) for p in [*x.tolist(), *y.tolist()] for q in x.tolist()]
    assert min(d for d in distances if d) < median_distance(x, y) < max(distances)
    median = median_distance(x, y)

    def mixture(p: Tensor, q: Tensor) -> float:
        squared = (p.double() - q.double()).square().sum().item()
        return sum(math.exp(-squared / (2 * (w * median) ** 2)) for w in BANDWIDTHS) / 5

    def cubic(p: Tensor, q: Tensor) -> float:
        return (torch.dot(p.double(), q.double()).item() / 4 + 1) ** 3

    assert gaussian_mmd(x, y, chunk=chunk) == pytest.approx(brute_mmd(x, y, mixture), rel=1e-9)
    assert polynomial_mmd(x, y, chunk=chunk) == pytest.approx(brute_mmd(x, y, cubic), rel=1e-9)


@pytest.mark.parametrize("mmd", [gaussian_mmd, polynomial_mmd])
def test_mmd_is_unbiased(mmd) -> None:
    """Its mean between sets of one distribution is zero, within four standard errors, at any size."""
    for n, m in ((20, 20), (15, 60)):
        values = torch.tensor(
            [
                mmd(gaussian(n, 3, seed=2 * k), gaussian(m, 3, seed=2 * k + 1), chunk=64)
                for k in range(60)
            ]
        )
        assert values.mean().abs() < 4 * values.std() / math.sqrt(60)
        assert values.min() < 0


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    """From exact moments: for commuting covariances sum (sqrt l_1 - sqrt l_2)^2, and in general the
    trace of the principal root of the product."""
    generator = torch.Generator().manual_seed(0)
    factor = [torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    means = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2)]
    covariances = [f @ f.T for f in factor]
    count = torch.tensor(1e6, dtype=torch.float64)

    def moments(mean: Tensor, covariance: Tensor) -> Moments:
        products = covariance * (count - 1) + count * torch.outer(mean, mean)
        return Moments(count, count * mean, products)

    found = frechet_distance(*map(moments, means, covariances))
    eigenvalues = torch.linalg.eigvals(covariances[0] @ covariances[1]).real
    expected = (means[0] - means[1]).square().sum()
    expected += sum(c.trace() for c in covariances) - 2 * eigenvalues.sqrt().sum()
    assert found == pytest.approx(expected.item(), rel=1e-6)
    diagonal = [torch.tensor([1.0, 4.0, 9.0, 0.0, 2.0]).double().diag() for _ in range(2)]
    diagonal[1] = torch.tensor([4.0, 1.0, 0.25, 0.0, 2.0]).double().diag()
    found = frechet_distance(moments(means[0], diagonal[0]), moments(means[0], diagonal[1]))
    assert found == pytest.approx(1 + 1 + 2.5**2, rel=1e-6)


def test_frechet_distance_of_samples_approaches_that_of_their_distributions() -> None:
    x, y = gaussian(4000, 3), 2.0 * gaussian(4000, 3, seed=1) + 1.0
    # |1|^2 3 + 3 (2 - 1)^2
    assert frechet(x, y) == pytest.approx(6.0, rel=0.1)


def test_fewer_samples_than_features_still_have_a_distance() -> None:
    x, y = gaussian(10, 30), gaussian(12, 30, seed=1)
    assert 0.0 < frechet(x, y) < 60.0
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="two samples; there are 1"):
        frechet(x[:1], y)


def test_moments_of_parts_add_up() -> None:
    x, y = gaussian(101, 6) + 3.0, gaussian(50, 6, seed=1)
    parts = [Moments.of(part) for part in (x[:40], x[40:41], x[41:])]
    whole = frechet_distance(Moments.of(x), Moments.of(y))
    together = frechet_distance(parts[0] + parts[1] + parts[2], Moments.of(y))
    assert together == pytest.approx(whole, rel=1e-10)
    torch.testing.assert_close(Moments.of(x).covariance, torch.cov(x.double().T))


def test_a_number_that_is_not_finite_makes_no_distance() -> None:
    x = gaussian(20, 3)
    x[3, 1] = float("nan")
    assert math.isnan(frechet(x, gaussian(20, 3)))


def test_a_number_that_is_not_finite_lies_in_no_manifold() -> None:
    x, y = gaussian(20, 3), gaussian(20, 3)
    y[3, 1] = float("nan")
    for found in (precision_recall(*pair, neighbours=3, chunk=7) for pair in ((x, y), (y, x))):
        assert all(math.isnan(value) for value in vars(found).values())
    with pytest.raises(ValueError, match="not finite make no pairs"):
        exact_wasserstein(x, y)


@pytest.mark.parametrize(
    "distance",
    [
        partial(energy_distance, chunk=4),
        partial(sliced_wasserstein, projections=4, seed=0),
        partial(gaussian_mmd, chunk=4),
        exact_wasserstein,
    ],
)
def test_nothing_is_near_no_samples(distance) -> None:
    for sets in ((gaussian(0, 3), gaussian(9, 3)), (gaussian(9, 3), gaussian(0, 3))):
        with pytest.raises(ValueError, match="has no meaning; give some of each"):
            distance(*sets)


def test_exact_wasserstein_finds_the_best_pairing() -> None:
    from itertools import permutations

    x, y = gaussian(6, 3), gaussian(6, 3, seed=1) + 0.3
    best = min((x - y[list(order)]).square().sum(1).mean() for order in permutations(range(6)))
    assert exact_wasserstein(x, y) == pytest.approx(math.sqrt(best.item()), rel=1e-6)
    shift = gaussian(1, 3, seed=2)
    assert exact_wasserstein(x, (x + shift).flip(0)) == pytest.approx(shift.norm().item(), rel=1e-6)
    with pytest.raises(ValueError, match="no pairs"):
        exact_wasserstein(x, y[:5])


def test_precision_and_recall_are_their_definitions() -> None:
    samples, real = gaussian(23, 2), gaussian(17, 2, seed=1) + 0.8
    k = 3

    def radius(points: Tensor, i: int) -> float:
        return sorted(math.dist(points[i], other) for other in points)[k]

    def inside(point: Tensor, points: Tensor) -> list[bool]:
        return [math.dist(point, points[i]) <= radius(points, i) for i in range(len(points))]

    in_real = torch.tensor([inside(point, real) for point in samples])
    in_samples = torch.tensor([inside(point, samples) for point in real])
    for chunk in (4, 100):
        found = precision_recall(samples, real, neighbours=k, chunk=chunk)
        assert found.precision == pytest.approx(in_real.any(1).double().mean().item())
        assert found.recall == pytest.approx(in_samples.any(1).double().mean().item())
        assert found.density == pytest.approx(in_real.sum().item() / (k * 23))
        assert found.coverage == pytest.approx(in_real.any(0).double().mean().item())


def test_a_set_lies_in_itself_and_a_far_one_does_not() -> None:
    x = gaussian(60, 5)
    same = precision_recall(x, x, neighbours=3, chunk=16)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    far = precision_recall(x + 100, x, neighbours=3, chunk=16)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)
    half = x[:, :1].abs() * torch.tensor([1.0] + [0.0] * 4) + x * torch.tensor([0.0] + [1.0] * 4)
    lost = precision_recall(half, x, neighbours=3, chunk=16)
    assert lost.precision > lost.recall
    with pytest.raises(ValueError, match="3 neighbours"):
        precision_recall(x[:3], x, neighbours=3, chunk=16)


def recall_lost(x: Tensor, y: Tensor) -> float:
    found = precision_recall(y, x, neighbours=3, chunk=100)
    return 2.0 - found.precision - found.coverage


DISTANCES = {
    "gaussian_mmd": lambda x, y: gaussian_mmd(x, y, chunk=64),
    "polynomial_mmd": lambda x, y: polynomial_mmd(x, y, chunk=64),
    "frechet": frechet,
    "exact_wasserstein": exact_wasserstein,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_is_near_zero_to_itself_symmetric_and_repeatable(name) -> None:
    distance, n = DISTANCES[name], 80
    x, y = gaussian(n, 4), gaussian(n, 4, seed=1) + 0.5
    unbiased = "mmd" in name
    itself = distance(x, x)
    assert itself == pytest.approx(0.0, abs=0.5 if unbiased else 1e-6)
    assert not unbiased or itself < 0
    assert distance(x, y) == distance(x, y)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)
    assert distance(x, y[torch.randperm(n)]) == pytest.approx(distance(x, y), rel=1e-9)
    assert distance(x, y) > itself


@pytest.mark.parametrize("name", [*DISTANCES, "recall_lost"])
def test_every_distance_grows_with_added_noise(name) -> None:
    distance = DISTANCES.get(name, recall_lost)
    x, y, noise = (gaussian(200, 4, seed=seed) for seed in range(3))
    values = [distance(x, y + scale * noise) for scale in (0.0, 0.7, 1.5, 3.0)]
    assert values == sorted(values)
    assert values[-1] > values[0]


class TestFeatures:
    images = gaussian(12, 3, 10, 10).clamp(-1, 1)

    def every(self):
        return [
            pixels(),
            low_frequencies(20),
            principal_components(self.images, 5),
            random_convnet(3),
        ]

    def test_each_image_has_its_features_in_any_company(self) -> None:
        for features in self.every():
            whole = features.extract(self.images)
            assert whole.dtype == torch.float64
            parts = features.of(self.images, chunk=5)
            torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
            assert (whole.std(0) > 0).double().mean() > 0.9, features.name

    def test_names_say_what_they_are(self) -> None:
        assert [f.name for f in self.every()] == ["pixels", "dct20", "pca5", "conv256-s0-v1"]

    def test_low_frequencies_are_those_of_scipy(self) -> None:
        from scipy.fft import dctn

        expected = dctn(self.images.double().numpy(), axes=(2, 3), norm="ortho")
        found = low_frequencies(100).extract(self.images).reshape(12, 3, 100)
        places = sorted((r + c, r, c) for r in range(10) for c in range(10))
        for k, (_, row, column) in enumerate(places):
            np.testing.assert_allclose(found[:, :, k], expected[:, :, row, column], atol=1e-12)
        some = low_frequencies(7).extract(self.images).reshape(12, 3, 7)
        assert torch.equal(some, found[:, :, :7])
        table = cosines(8, torch.device("cpu"))
        torch.testing.assert_close(table @ table.T, torch.eye(8, dtype=torch.float64))
        # Rotations keep the Fréchet distance.
        other = gaussian(40, 1, 4, 4, seed=3)
        mine = gaussian(40, 1, 4, 4, seed=4)
        of_pixels = frechet(*(pixels().extract(part) for part in (mine, other)))
        of_waves = frechet(*(low_frequencies(64).extract(part) for part in (mine, other)))
        assert of_waves == pytest.approx(of_pixels, rel=1e-9)

    def test_principal_components_hold_the_most_variance(self) -> None:
        train = gaussian(300, 1, 3, 3) * torch.linspace(0.1, 2.0, 9).view(1, 3, 3) + 1.0
        found = principal_components(train, 4).extract(train)
        covariance = torch.cov(train.flatten(1).double().T)
        expected = torch.linalg.eigvalsh(covariance).flip(0)[:4]
        torch.testing.assert_close(torch.cov(found.T), expected.diag(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(found.mean(0), torch.zeros(4).double(), atol=1e-10, rtol=0)
        assert principal_components(train, 100).name == "pca9"

    def test_filters_are_orthogonal_and_the_network_is_always_the_same(self) -> None:
        for inputs, outputs, stage in ((3, 64, 0), (64, 128, 1), (128, 256, 2)):
            matrix = orthogonal_filters(inputs, outputs, stage).flatten(1)
            small = min(matrix.shape)
            gram = matrix.T @ matrix if outputs >= 9 * inputs else matrix @ matrix.T
            torch.testing.assert_close(gram, 2 * torch.eye(small, dtype=torch.float64))
        found = random_convnet(1).extract(torch.linspace(-1, 1, 64).view(1, 1, 8, 8))
        assert found.shape == (1, 256)
        # A change of these numbers is another feature and needs another version in its name.
        expected = torch.tensor([0.0, 0.033803185018, 0.034658196899, 0.016489540528])
        torch.testing.assert_close(found[0, :4], expected.double(), rtol=1e-6, atol=1e-9)

    def test_the_network_sees_more_than_the_mean_image(self) -> None:
        stripes = torch.ones(40, 1, 8, 8)
        stripes[:, :, ::2] = -1.0
        turned = stripes.transpose(2, 3)
        noise = 0.3 * gaussian(40, 1, 8, 8)
        extract = random_convnet(1).extract
        other = 0.3 * gaussian(40, 1, 8, 8, seed=1)
        near = frechet(extract(stripes + noise), extract(stripes + other))
        far = frechet(extract(stripes + noise), extract(turned + other))
        assert far > 3 * near


def test_bits_of_a_mixture_are_those_of_the_density_it_fits() -> None:
    """One component on normal data: the entropy of a normal in bins."""
    width = 2 / 256
    train, heldout = (0.25 * gaussian(3000, 1, 2, 2, seed=seed) for seed in (0, 1))
    bits = gaussian_mixture_bits(train, heldout, components=1, bin_width=width, seed=0)
    entropy = 0.5 * math.log2(2 * math.pi * math.e) + math.log2(0.25 / width)
    assert bits.shape == (3000,)
    assert bits.mean().item() == pytest.approx(entropy, abs=0.03)


def test_a_mixture_needs_fewer_bits_than_a_normal_where_pixels_have_two_values() -> None:
    levels = Levels(256, "inside")
    generator = torch.Generator().manual_seed(0)
    bright = torch.rand(1500, 1, 2, 2, generator=generator) < torch.tensor(
        [0.2, 0.5, 0.9, 0.0]
    ).view(1, 1, 2, 2)
    image = torch.where(bright, 0.6, -1.0)
    batch = Batch(image, torch.zeros(1500, dtype=torch.int64), torch.arange(1500))
    objective = Likelihood("uniform", levels, 0.0, 0.0, 0.0, 1, None)
    seen = objective.prepare(batch, Draw(0, 0, batch.position)).inputs["x"]
    bits = {
        components: gaussian_mixture_bits(
            seen[:1000], seen[1000:], components=components, bin_width=levels.width, seed=0
        )
        .mean()
        .item()
        for components in (1, 2)
    }
    entropy = (
        np.mean([-(p * np.log2(p) + (1 - p) * np.log2(1 - p)) for p in (0.2, 0.5, 0.9)]) * 3 / 4
    )
    # A normal in place of a uniform bin costs 1/2 log2(2 pi e / 12) = 0.25 bits.
    assert bits[2] == pytest.approx(entropy + 0.2546, abs=0.05)
    assert bits[1] > bits[2] + 1.0
