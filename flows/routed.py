"""What routers of experts tell about themselves, one row a sample.

Sums of rows over samples are the same however a batch is split over microbatches and ranks; so
whatever is made of routing (a loss, a balance, a picture) is made of such sums.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routed(NamedTuple):
    """The routing of one layer, or of several in a dimension after the batch. No graph.

    load: (batch, [layers,] experts) float32 slots that asked for each expert, dropped ones included
    dropped: (batch, [layers]) slots that found no place; where experts choose, tokens without an expert
    entropy: (batch, [layers]) mean over tokens of the entropy of their distribution over experts, in nats
    ties: (batch, [layers]) choices that hang on a difference that rounding could turn: of a token's last
        expert, and of an expert's last place, where places are fewer than claims
    flow: (batch, [layers,] experts, experts) float32 pairs of a slot of the layer before, by its expert,
        and one of this layer of the same token; zeros in the first layer. Without experts,
        (batch, [layers,] 0, 0), where nobody asked for it
    """

    load: Tensor
    dropped: Tensor
    entropy: Tensor
    ties: Tensor
    flow: Tensor


class Mixed(NamedTuple):
    """What a network of experts gives while it trains: tensors alone, as pipelines pass them.

    prediction: as it gives otherwise
    penalty: (batch,) float32 losses of all its routers, weighted: the objective adds them
    load, dropped, entropy, ties, flow: of all layers, see `Routed`
    """

    prediction: Tensor
    penalty: Tensor
    load: Tensor
    dropped: Tensor
    entropy: Tensor
    ties: Tensor
    flow: Tensor

    @property
    def routed(self) -> Routed:
        return Routed(self.load, self.dropped, self.entropy, self.ties, self.flow)


def stacked(layers: list[Routed]) -> Routed:
    """Layers of one batch along a dimension after it."""
    return Routed(*(torch.stack(values, 1) for values in zip(*layers, strict=True)))


def joined(batches: list[Routed]) -> Routed:
    """Microbatches one after the other."""
    return Routed(*(torch.cat(values) for values in zip(*batches, strict=True)))
