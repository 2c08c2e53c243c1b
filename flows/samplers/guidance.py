"""Classifier-free guidance (Ho and Salimans 2022), in an interval (Kynkäänniemi et al. 2024)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# name -> (batch, ...): what a sample is asked to be, such as `label` (batch,) int64 and `text`
# (batch, tokens, width).
Condition = Mapping[str, Tensor]
# velocity(x (batch, ...), t (batch,), condition) -> (batch, ...)
Velocity = Callable[[Tensor, Tensor, Condition], Tensor]


@dataclass(frozen=True)
class Guidance:
    """v = v_null + scale (v_condition - v_null) where low <= t < high; elsewhere the condition alone.

    scale: 1 is no guidance, 0 no condition
    low, high: flow times; high = 1 means to the very end
    """

    scale: float
    low: float
    high: float

    def applies(self, t: float) -> bool:
        return self.scale != 1.0 and self.low <= t and (t < self.high or self.high >= 1.0)


def null_condition(condition: Condition, null_label: int) -> Condition:
    """The condition that asks for nothing, as training drops it: `null_label`, zeros for the rest."""
    return {
        name: torch.full_like(value, null_label if name == "label" else 0)
        for name, value in condition.items()
    }


class Field:
    """The guided velocity of a few samples as a function of (x, t); counts what it costs.

    network_calls: network evaluations for each sample so far; a guided one costs two
    """

    def __init__(
        self, velocity: Velocity, condition: Condition, null: Condition, guidance: Guidance
    ) -> None:
        """null: what the samples are guided away from, the same names as in `condition`"""
        self.network_calls = 0
        self._velocity = velocity
        self._guidance = guidance
        self._condition = condition
        self._both = {name: torch.cat((value, null[name])) for name, value in condition.items()}

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """(batch, ...) -> (batch, ...) in float32, by one network call, of 2 batch if guided."""
        if not self._guidance.applies(t):
            self.network_calls += 1
            return self._velocity(x, x.new_full((len(x),), t), self._condition).float()
        self.network_calls += 2
        doubled = torch.cat((x, x))
        both = self._velocity(doubled, x.new_full((len(doubled),), t), self._both).float()
        asked, without = both.chunk(2)
        return torch.lerp(without, asked, self._guidance.scale)
