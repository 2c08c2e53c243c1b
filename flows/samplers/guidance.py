"""Classifier-free guidance (Ho and Salimans 2022), in an interval (Kynkäänniemi et al. 2024), while
it matters (Castillo et al. 2023, "Adaptive guidance")."""

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
    channels: how many of the first channels are guided, the others follow the condition alone, as
        DiT guides 3 of 4; None: all
    cosine: a sample whose v_condition and v_null have come this near in direction is guided no
        longer, which saves its call for v_null; None: never, -1: no sample is guided at all
    """

    scale: float
    low: float
    high: float
    channels: int | None = None
    cosine: float | None = None

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

    Whatever is guided, an evaluation is one network call, so that ranks that share a model stay in
    step. Each sample decides by itself when its guidance ends: no other sample changes it.

    network_calls: (batch,) int64 network evaluations for each sample so far; a guided one costs two
    """

    def __init__(
        self,
        velocity: Velocity,
        condition: Condition,
        null: Condition,
        guidance: Guidance,
        samples: Tensor,
    ) -> None:
        """null: what the samples are guided away from, the same names as in `condition`
        samples: (batch,) int64, one for each sample, on the device of x
        """
        self.network_calls = torch.zeros_like(samples)
        self._velocity = velocity
        self._guidance = guidance
        self._condition = condition
        self._null = null
        cosine = guidance.cosine
        # No cosine is below -1, so at that threshold all have reached it before the first call.
        none = cosine is not None and cosine <= -1.0
        self._guide(torch.arange(0 if none else len(samples), device=samples.device))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """(batch, ...) -> (batch, ...) float32, by one network call, of up to 2 batch if guided."""
        self.network_calls += 1
        if not len(self._guided) or not self._guidance.applies(t):
            return self._velocity(x, x.new_full((len(x),), t), self._condition).float()
        self.network_calls[self._guided] += 1
        more = torch.cat((x, x[self._guided]))
        both = self._velocity(more, x.new_full((len(more),), t), self._both).float()
        plain, without = both.tensor_split((len(x),))
        asked = plain[self._guided]
        guided = torch.lerp(without, asked, self._guidance.scale)
        channels = self._guidance.channels
        if channels is not None:
            guided[:, channels:] = asked[:, channels:]
        if self._guidance.cosine is not None:
            # Not a number, where a velocity is zero, has reached nothing.
            reached = _cosine(asked, without) >= self._guidance.cosine
            velocity = plain.index_copy(0, self._guided, guided)
            self._guide(self._guided[~reached])
            return velocity
        return guided

    def _guide(self, guided: Tensor) -> None:
        """From here on, guide the samples at these rows and no others."""
        self._guided = guided
        self._both = {
            name: torch.cat((value, self._null[name][guided]))
            for name, value in self._condition.items()
        }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """(batch,) float64 cosine of the angle between two tensors (batch, ...), sample by sample."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()
