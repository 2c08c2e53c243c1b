"""Placements of experts on traces whose answer is known: planted affinity, and loads by Zipf's law."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from parallel.placement.problem import Layer, Places, Problem, Reals, contiguous, hops, imbalance
from parallel.placement.solve import place

TOKENS, LIMIT, SECONDS, STARTS = 20_000, 1.05, 30.0, 8
SHAPES = ((4, 8, 2), (12, 8, 4), (12, 32, 4), (12, 64, 8))  # layers, experts, ranks
NOISES = (0.0, 0.1, 0.3, 0.5)
# Layers, experts, ranks, exponent: of steeper laws one expert alone has more than a rank's share.
STEEP = ((6, 16, 2, 1.0), (6, 64, 2, 1.0), (6, 64, 4, 0.8), (6, 64, 8, 0.4))

# (generator, layer, (tokens,) experts of the layer before) -> (tokens,) experts of this one
Route = Callable[[np.random.Generator, int, Layer], Layer]


@dataclass(frozen=True)
class Found:
    """One trace, before and after its experts were placed.

    trace: in words; planted: hops of the placement that is hidden in it, where one is
    before, after: hops; uneven, evened: the load of the busiest rank over the mean, in the worst layer
    met: not more hops than planted; where nothing is planted, loads within `LIMIT`
    """

    trace: str
    shape: tuple[int, int, int]
    method: str
    before: int
    after: int
    planted: int | None
    uneven: float
    evened: float
    seconds: float
    met: bool

    @property
    def fewer(self) -> float:
        return 1 - self.after / self.before


def routed(layers: int, experts: int, tokens: int, seed: int, route: Route) -> tuple[Reals, Reals]:
    """Flow (layers - 1, experts, experts) and load (layers, experts) of tokens that go as `route` says."""
    generator = np.random.default_rng(seed)
    flow, load = np.zeros((layers - 1, experts, experts)), np.zeros((layers, experts))
    at = np.zeros(tokens, dtype=np.int64)
    for layer in range(layers):
        there = route(generator, layer, at)
        if layer:
            np.add.at(flow[layer - 1], (at, there), 1)
        at, load[layer] = there, np.bincount(there, minlength=experts)
    return flow, load


def planted(
    layers: int, experts: int, ranks: int, noise: float, seed: int
) -> tuple[Reals, Reals, Places]:
    """Tokens stay among the experts of a hidden placement, but for a share `noise` that goes anywhere."""
    hidden = np.random.default_rng((seed, 1))
    places = hidden.permuted(contiguous(layers, experts, ranks), axis=1)
    mates = np.stack([[np.flatnonzero(own == rank) for rank in range(ranks)] for own in places])

    def route(generator: np.random.Generator, layer: int, at: Layer) -> Layer:
        anywhere = generator.integers(experts, size=len(at))
        if layer == 0:
            return anywhere
        mate = generator.integers(experts // ranks, size=len(at))
        stays = mates[layer, places[layer - 1, at], mate]
        return np.where(generator.random(len(at)) < noise, anywhere, stays)

    return *routed(layers, experts, TOKENS, seed, route), places


def zipf(layers: int, experts: int, exponent: float, seed: int) -> tuple[Reals, Reals]:
    """The n-th expert of a layer, in an order of its own, has a load of n^-exponent."""
    loads = np.tile(np.arange(1, experts + 1) ** -exponent, (layers, 1))
    shares = np.random.default_rng((seed, 1)).permuted(loads, axis=1)
    shares /= shares.sum(1, keepdims=True)

    def route(generator: np.random.Generator, layer: int, at: Layer) -> Layer:
        return generator.choice(experts, size=len(at), p=shares[layer])

    return routed(layers, experts, TOKENS, seed, route)


def measure(seed: int) -> list[Found]:
    """Every trace; of planted ones hops alone are made few, of the others loads even as well."""
    found = []
    for shape in SHAPES:
        for noise in NOISES:
            flow, load, hidden = planted(*shape, noise, seed)
            problem = Problem(flow, load, shape[2], np.inf)
            found.append(_found(f"planted, noise {noise:g}", problem, hidden))
    for layers, experts, ranks, exponent in STEEP:
        flow, load = zipf(layers, experts, exponent, seed)
        found.append(
            _found(f"Zipf, exponent {exponent:g}", Problem(flow, load, ranks, LIMIT), None)
        )
    return found


def _found(trace: str, problem: Problem, hidden: Places | None) -> Found:
    begun = time.perf_counter()
    placed = place(problem, method="auto", starts=STARTS, seed=0, seconds=SECONDS)
    seconds = time.perf_counter() - begun
    shape = (problem.layers, problem.experts, problem.ranks)
    before, after = (round(hops(problem.flow, at)) for at in (contiguous(*shape), placed.places))
    uneven, evened = (
        float(imbalance(problem.load, at, problem.ranks).max())
        for at in (contiguous(*shape), placed.places)
    )
    best = None if hidden is None else round(hops(problem.flow, hidden))
    met = evened <= LIMIT if best is None else after <= best
    return Found(trace, shape, placed.method, before, after, best, uneven, evened, seconds, met)
