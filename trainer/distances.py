"""How far samples are from real images, by several measures, each beside what real images score."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flows.metrics.energy import energy_distance
from flows.metrics.features import Features, principal_components, random_convnet
from flows.metrics.frechet import Moments, frechet_distance
from flows.metrics.kernel import polynomial_mmd
from flows.metrics.manifold import precision_recall
from flows.metrics.wasserstein import sliced_wasserstein

CHUNK = 512
COMPONENTS = 32
SAMPLES_A_FEATURE = 10  # fewer, and a Fréchet distance measures its own bias
PROJECTIONS = 256
NEIGHBOURS = 3


@dataclass(frozen=True)
class Measure:
    """One measure between sets of `Distances.count` images.

    samples: of samples and held-out images; None where there are too few to say
    real: of as many training images and the same held-out ones, what a perfect generator would have
    """

    name: str
    samples: float | None
    real: float | None


@dataclass(frozen=True)
class Distances:
    """Measures of `count` samples against as many held-out images."""

    measures: list[Measure]
    count: int


def distances(samples: Tensor, train: Tensor, heldout: Tensor, seed: int) -> Distances:
    """Samples against held-out images beside training images against the same held-out images.

    The sets are cut to one size, at random by `seed`: every measure of finite sets depends on it.
    """
    count = min(len(samples), len(train), len(heldout))
    generator = torch.Generator().manual_seed(seed)
    made, real, unseen = (_choose(images, count, generator) for images in (samples, train, heldout))
    pca = principal_components(
        _as_saved(train), min(COMPONENTS, max(count // SAMPLES_A_FEATURE, 1))
    )
    convnet = random_convnet(samples.shape[1])
    sets = {features.name: _features(features, made, real, unseen) for features in (pca, convnet)}
    flat = [images.flatten(1) for images in (made, real, unseen)]
    found = [
        _both("energy distance", lambda x, y: energy_distance(x, y, chunk=CHUNK), flat),
        _both(f"FD-{pca.name}", _frechet, sets[pca.name], least=2),
        _both(
            f"polynomial MMD of {convnet.name}",
            lambda x, y: polynomial_mmd(x, y, chunk=CHUNK),
            sets[convnet.name],
            least=2,
        ),
        _both(
            "sliced Wasserstein distance",
            lambda x, y: sliced_wasserstein(x, y, projections=PROJECTIONS, seed=seed),
            flat,
        ),
    ]
    for name, measure in (("precision", _precision), ("recall", _recall)):
        found.append(
            _both(f"{name} in {convnet.name}", measure, sets[convnet.name], least=NEIGHBOURS + 1)
        )
    return Distances(found, count)


def _both(
    name: str, measure: Callable[[Tensor, Tensor], float], sets: list[Tensor], least: int = 1
) -> Measure:
    """least: images of each set without which the measure has no meaning"""
    made, real, unseen = sets
    if len(made) < least:
        return Measure(name, None, None)
    return Measure(name, measure(made, unseen), measure(real, unseen))


def _precision(samples: Tensor, real: Tensor) -> float:
    return precision_recall(samples, real, neighbours=NEIGHBOURS, chunk=CHUNK).precision


def _recall(samples: Tensor, real: Tensor) -> float:
    return precision_recall(samples, real, neighbours=NEIGHBOURS, chunk=CHUNK).recall


def _frechet(x: Tensor, y: Tensor) -> float:
    return frechet_distance(Moments.of(x), Moments.of(y))


def _features(features: Features, *sets: Tensor) -> list[Tensor]:
    return [features.of(images, chunk=CHUNK) for images in sets]


def _choose(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return _as_saved(images)[torch.randperm(len(images), generator=generator)[:count]]


def _as_saved(images: Tensor) -> Tensor:
    """Images in their range, black where not a number, on the CPU."""
    return images.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1).cpu()
