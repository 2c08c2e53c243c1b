"""Mixture paths of discrete flow matching (Gat et al. 2024, "Discrete flow matching").

Every token is data with probability kappa_t and still its source with probability 1 - kappa_t, kappa
rising from 0 to 1. Given p(data | x_t), the probability of a jump of one token from x_t to y in a
short time is kappa' / (1 - kappa) (p(y | x_t) - [y = x_t]).

Images become tokens by their levels: 0 is black, levels - 1 white. Tokens stand in the order row,
column, channel.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flows.randomness import Draw

Source = Literal["mask", "uniform"]


@dataclass(frozen=True)
class MixturePath:
    """kappa_t = t^n.

    levels: symbols of the data; the symbol `levels` is the mask
    source: what tokens are at t = 0, all the mask or uniform over the levels
    exponent: n >= 1; the greater, the later tokens become data
    """

    levels: int
    source: Source
    exponent: float

    @property
    def symbols(self) -> int:
        """Of which a token may be one on its way."""
        return self.levels + 1

    def kappa(self, t: Tensor) -> Tensor:
        """Probability of data at t, like t; computed in float64, rounded once."""
        return t.to(torch.float64).pow(self.exponent).to(t.dtype)

    def rate(self, t: Tensor) -> Tensor:
        """kappa' / (1 - kappa), like t: how fast the tokens that are source still become data."""
        exact = t.to(torch.float64)
        slope = self.exponent * exact.pow(self.exponent - 1)
        return (slope / -torch.expm1(self.exponent * torch.log(exact))).to(t.dtype)

    def source_law(self) -> Tensor:
        """(symbols,) probabilities of a token at t = 0."""
        law = torch.zeros(self.symbols)
        if self.source == "mask":
            law[self.levels] = 1.0
        else:
            law[: self.levels] = 1.0 / self.levels
        return law

    def draw_source(self, draw: Draw, tokens: int) -> Tensor:
        """(batch, tokens) int64 at t = 0."""
        if self.source == "mask":
            shape = (len(draw.samples), tokens)
            return torch.full(shape, self.levels, device=draw.samples.device)
        uniform = draw.uniform("source", (tokens,))
        return (uniform * self.levels).long().clamp_max(self.levels - 1)

    def mix(self, data: Tensor, t: Tensor, draw: Draw) -> Tensor:
        """(batch, tokens) int64 x_t of data (batch, tokens) at t (batch,)."""
        arrived = draw.uniform("arrived", (data.shape[1],)) < self.kappa(t)[:, None]
        return torch.where(arrived, data, self.draw_source(draw, data.shape[1]))


def to_tokens(image: Tensor, levels: int) -> Tensor:
    """(batch, height * width * channels) int64 nearest levels of an image in [-1, 1]."""
    level = (image.clamp(-1, 1) + 1) * ((levels - 1) / 2)
    return level.round().long().movedim(1, -1).flatten(1)


def to_image(tokens: Tensor, levels: int, shape: tuple[int, int, int]) -> Tensor:
    """(batch, *shape) float32 in [-1, 1]; shape: (channels, height, width)."""
    channels, height, width = shape
    level = tokens.reshape(-1, height, width, channels).movedim(-1, 1)
    return level * (2 / (levels - 1)) - 1.0
