"""What is wanted of a placement of experts, and what one costs.

A placement says for each layer on which rank each expert is, with equally many on all ranks. Two costs:
tokens that have to change ranks between successive layers (inter-layer affinity: Yao et al. 2024, "Exploiting
Inter-Layer Expert Affinity", ExFlow), and the load of the busiest rank over the mean (Go and Mahajan 2025,
MoETuner). The second is bounded, the first is then made small.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Places = NDArray[np.int64]  # (layers, experts) the rank of each expert
Layer = NDArray[np.int64]  # (experts,) the same of one layer


@dataclass(frozen=True)
class Problem:
    """What is known of the tokens, and what is asked.

    flow: (layers - 1, experts, experts) tokens from each expert to each expert of the next layer
    load: (layers, experts) tokens of each expert
    ranks: a divisor of the experts
    limit: the load of a layer's busiest rank over the mean that a placement may have; in a layer that
        cannot be as even, the least there is. Infinite: loads are nobody's concern
    """

    flow: Reals
    load: Reals
    ranks: int
    limit: float

    @property
    def layers(self) -> int:
        return len(self.load)

    @property
    def experts(self) -> int:
        return len(self.load[0])

    @property
    def seats(self) -> int:
        """Experts of a layer on each rank."""
        return self.experts // self.ranks


def contiguous(layers: int, experts: int, ranks: int) -> Places:
    """The first experts on the first rank and so on, as experts lie where nobody placed them."""
    return np.tile(np.arange(experts) // (experts // ranks), (layers, 1))


def member(layer: Layer, ranks: int) -> Reals:
    """(experts, ranks) 1 where an expert is on a rank."""
    one_hot: Reals = np.eye(ranks)[layer]
    return one_hot


def kept(flow: Reals, places: Places) -> float:
    """The tokens that find their next expert on the rank where they are."""
    stays = places[:-1, :, None] == places[1:, None, :]
    return float((flow * stays).sum())


def hops(flow: Reals, places: Places) -> float:
    """The tokens whose next expert is on another rank, over all pairs of successive layers."""
    return float(flow.sum()) - kept(flow, places)


def busyness(layer: Layer, load: Reals, ranks: int) -> Reals:
    """(ranks,) tokens of each rank in one layer."""
    tokens: Reals = np.bincount(layer, load, ranks).astype(np.float64)
    return tokens


def imbalance(load: Reals, places: Places, ranks: int) -> Reals:
    """(layers,) the load of the busiest rank over the mean; 1 in a layer without tokens."""
    found = np.stack([busyness(at, own, ranks) for own, at in zip(load, places, strict=True)])
    mean = found.mean(1)
    return np.where(mean > 0, found.max(1) / np.where(mean > 0, mean, 1.0), 1.0)


def gains(problem: Problem, places: Places, layer: int, known: NDArray[np.bool_]) -> Reals:
    """(experts, ranks) tokens kept if an expert of `layer` were on a rank, its neighbours where they are.

    known: (layers,) which layers have been placed; the others keep none
    """
    found = np.zeros((problem.experts, problem.ranks))
    if layer > 0 and known[layer - 1]:
        found += problem.flow[layer - 1].T @ member(places[layer - 1], problem.ranks)
    if layer + 1 < problem.layers and known[layer + 1]:
        found += problem.flow[layer] @ member(places[layer + 1], problem.ranks)
    return found
