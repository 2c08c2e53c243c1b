"""Classifier-free guidance (Ho and Salimans 2022), in an interval (Kynkäänniemi et al. 2024)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# velocity(x (batch, ...), t (batch,), label (batch,)) -> (batch, ...)
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Guidance:
    """v = v_null + scale (v_label - v_null) where low <= t < high; elsewhere the label alone.

    scale: 1 is no guidance, 0 no label
    low, high: flow times; high = 1 means to the very end
    null_label: the label that stands for none
    """

    scale: float
    low: float
    high: float
    null_label: int

    def applies(self, t: float) -> bool:
        return self.scale != 1.0 and self.low <= t and (t < self.high or self.high >= 1.0)


class Field:
    """The guided velocity of a few samples as a function of (x, t); counts what it costs.

    network_calls: network evaluations for each sample so far; a guided one costs two
    """

    def __init__(self, velocity: Velocity, label: Tensor, guidance: Guidance) -> None:
        self.network_calls = 0
        self._velocity = velocity
        self._guidance = guidance
        self._label = label
        self._both = torch.cat((label, torch.full_like(label, guidance.null_label)))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """(batch, ...) -> (batch, ...) in float32, by one network call, of 2 batch if guided."""
        if not self._guidance.applies(t):
            self.network_calls += 1
            return self._velocity(x, x.new_full((len(x),), t), self._label).float()
        self.network_calls += 2
        doubled = torch.cat((x, x))
        both = self._velocity(doubled, x.new_full((len(doubled),), t), self._both).float()
        with_label, without = both.chunk(2)
        return torch.lerp(without, with_label, self._guidance.scale)
