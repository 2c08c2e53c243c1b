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
NETWORK_CHUNK = 32  # images in one call of a network that somebody trained, which takes them large
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


def distances(
    samples: Tensor, train: Tensor, heldout: Tensor, seed: int, own: Features | None = None
) -> Distances:
    """Samples against held-out images beside training images against the same held-out images.

    The sets are cut to one size, at random by `seed`: every measure of finite sets depends on it.

    own: features of a trained network, to measure by as well
    """
    count = min(len(samples), len(train), len(heldout))
    generator = torch.Generator().manual_seed(seed)
    made, real, unseen = (_choose(images, count, generator) for images in (samples, train, heldout))
    pca = principal_components(
        _as_saved(train), min(COMPONENTS, max(count // SAMPLES_A_FEATURE, 1))
    )
    convnet = random_convnet(samples.shape[1])
    sets = {
        features.name: _features(features, CHUNK, made, real, unseen) for features in (pca, convnet)
    }
    flat = [images.flatten(1) for images in (made, real, unseen)]
    found = [
        _both("energy distance", lambda x, y: energy_distance(x, y, chunk=CHUNK), flat),
        _both(f"FD-{pca.name}", _frechet, sets[pca.name], least=2),
        _kernel_distance(convnet.name, sets[convnet.name]),
        _both(
            "sliced Wasserstein distance",
            lambda x, y: sliced_wasserstein(x, y, projections=PROJECTIONS, seed=seed),
            flat,
        ),
    ]
    found += _coverage(convnet.name, sets[convnet.name])
    if own is not None:
        of_own = _features(own, NETWORK_CHUNK, made, real, unseen)
        enough = SAMPLES_A_FEATURE * of_own[0].shape[1]
        found += [
            _both(f"FD-{own.name}", _frechet, of_own, least=enough),
            _kernel_distance(own.name, of_own),
            *_coverage(own.name, of_own),
        ]
    return Distances(found, count)


def _kernel_distance(name: str, sets: list[Tensor]) -> Measure:
    return _both(
        f"polynomial MMD of {name}", lambda x, y: polynomial_mmd(x, y, chunk=CHUNK), sets, least=2
    )


def _coverage(name: str, sets: list[Tensor]) -> list[Measure]:
    return [
        _both(f"{what} in {name}", measure, sets, least=NEIGHBOURS + 1)
        for what, measure in (("precision", _precision), ("recall", _recall))
    ]


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


def _features(features: Features, chunk: int, *sets: Tensor) -> list[Tensor]:
    return [features.of(images, chunk=chunk) for images in sets]


def _choose(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return _as_saved(images)[torch.randperm(len(images), generator=generator)[:count]]


def _as_saved(images: Tensor) -> Tensor:
    """Images in their range, black where not a number, on the CPU."""
    return images.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1).cpu()
