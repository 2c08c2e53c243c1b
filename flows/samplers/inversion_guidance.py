"""Guidance of normalizing flows: each predicted Gaussian is led away from an unconditional one.

With label (or text) a token is N(m, s^2) given the tokens before; without, it is N(m', s'^2). Weight
w leads from the second to the first and beyond; w = 0 is no guidance.

linear (TarFlow, Zhai et al. 2024)        a + w (a - a'),  m + w (m - m'); a is log s where the
                                          network gives log s (scale "exp") and s otherwise
distribution (STARFlow, Gu et al. 2025)   N(m, s^2)^(1 + w) / N(m', s'^2)^w, normalised: with
                                          r = min(s / s', 1)^2 and q = 1 + w - w r,
                                          s^2 / q  and  ((1 + w) m - w r m') / q
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.models.autoregressive import Scale

Form = Literal["linear", "distribution"]
Parts = Literal["both", "scale", "shift"]

# log s, m; the first None where a block preserves volume
Affine = tuple[Tensor | None, Tensor]


@dataclass(frozen=True)
class FlowGuidance:
    """How to guide.

    weight: w >= 0
    form: see the head of this file
    parts: what is guided; "distribution" takes "both" alone
    annealed: w grows in proportion along the chain, from w / N at the first token to w at the last
    temperature: attention logits of the unconditional network are divided by it; 1 leaves them.
        Another value guides unconditional blocks too, by themselves at this temperature
    """

    weight: float
    form: Form
    parts: Parts
    annealed: bool
    temperature: float

    def __post_init__(self) -> None:
        if self.form == "distribution" and self.parts != "both":
            raise ValueError("guidance of the distribution guides scale and shift together")

    def applies(self, conditional: bool) -> bool:
        """Whether a block needs a second, unconditional evaluation."""
        return self.weight != 0.0 and (conditional or self.temperature != 1.0)

    def weights(self, chain: int, like: Tensor) -> Tensor:
        """(chain, 1) weight of each predicted token."""
        if not self.annealed:
            return like.new_full((chain, 1), self.weight)
        place = torch.arange(1, chain + 1, device=like.device, dtype=like.dtype)
        return (place * (self.weight / chain))[:, None]


NO_GUIDANCE = FlowGuidance(0.0, "linear", "both", annealed=False, temperature=1.0)


def guide(
    log_scale: Tensor | None, shift: Tensor, weight: Tensor, *, how: FlowGuidance, scale: Scale
) -> Affine:
    """The guided prediction, from those with condition and, behind them in the batch, without.

    log_scale, shift: (2 batch, tokens, features)
    weight: (tokens, 1)
    returns (batch, tokens, features) each
    """
    m, m_null = shift.chunk(2)
    if log_scale is None:
        return None, _lead(m, m_null, weight) if how.parts != "scale" else m
    a, a_null = log_scale.chunk(2)
    if how.form == "distribution":
        ratio = ((a - a_null) * 2).clamp_(max=0.0).exp_()
        precision = 1 + weight - weight * ratio
        mean = ((1 + weight) * m - weight * ratio * m_null) / precision
        return a - 0.5 * precision.log(), mean
    if how.parts != "scale":
        m = _lead(m, m_null, weight)
    if how.parts != "shift":
        if scale == "exp":
            a = _lead(a, a_null, weight)
        else:
            # A standard deviation that would be led below zero is one of zero.
            a = _lead(a.exp(), a_null.exp(), weight).clamp_(min=0.0).log()
    return a, m


def _lead(value: Tensor, null: Tensor, weight: Tensor) -> Tensor:
    return value + weight * (value - null)
