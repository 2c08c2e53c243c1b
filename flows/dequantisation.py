"""From a few levels of brightness to a density: noise that fills the bin a pixel stands for.

A density has no likelihood of single values. With u drawn from q(u | x) inside the bin of x, and
y = x + u, the density p of a model bounds the probability of the level itself (Theis et al. 2016,
"A note on the evaluation of generative models"; Ho et al. 2019, "Flow++", section 3.1):

    log P(x) >= E_q [log p(y) - log q(u | x)]

with equality where q(u | x) is proportional to p(x + u).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flows.randomness import Draw

Bins = Literal["inside", "above", "around"]


@dataclass(frozen=True)
class Levels:
    """`count` values spread evenly over [-1, 1], and the bin of the line that each stands for.

    bins: "inside": the bins share [-1, 1], each 2 / count wide (TarFlow);
        "above": a bin begins at its value and is 2 / (count - 1) wide (Jet);
        "around": its value is its middle, as for a model trained on the values themselves
    """

    count: int
    bins: Bins

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2 / self.count if self.bins == "inside" else 2 / (self.count - 1)

    def lower(self, image: Tensor) -> Tensor:
        """The lower end of each value's bin; a value between two levels goes to the nearer.

        image: any shape, float32 in [-1, 1]
        """
        level = ((image + 1) * ((self.count - 1) / 2)).round()
        start = -1 - self.width / 2 if self.bins == "around" else -1.0
        return level * self.width + start


class Dequantised(NamedTuple):
    """y: (batch, ...) float32 points in the bins; log_q: (batch,) float32 log density of y there."""

    y: Tensor
    log_q: Tensor


def uniform_in_bin(image: Tensor, levels: Levels, draw: Draw) -> Dequantised:
    """Every place in the bin alike: log q = -D log width."""
    u = draw.uniform("dequantisation", tuple(image.shape[1:]))
    log_q = u.new_full((len(u),), -u[0].numel() * math.log(levels.width))
    return Dequantised(levels.lower(image) + levels.width * u, log_q)


def truncated_normal_in_bin(
    image: Tensor, levels: Levels, draw: Draw, *, std: float
) -> Dequantised:
    """A normal around the middle of the bin, cut off at its ends (Zheng et al. 2023, "Improved
    techniques for maximum likelihood estimation for diffusion ODEs", section 4.2).

    Where the model was trained on data with Gaussian noise of this `std`, its density has seen such
    points, so the bound is tighter than that of uniform noise.

    Computed in float64: the inverse error function of float32 depends on place and device.
    """
    half = torch.tensor(levels.width / 2 / std, dtype=torch.float64)
    inside = torch.special.erf(half / math.sqrt(2))
    uniform = draw.uniform("dequantisation", tuple(image.shape[1:])).double()
    normal = torch.special.ndtri(0.5 + inside.item() * (uniform - 0.5))
    u = normal.clamp(-half.item(), half.item()) * std
    each = -0.5 * normal.square() - math.log(std * math.sqrt(2 * math.pi) * inside.item())
    y = levels.lower(image) + levels.width / 2 + u.float()
    return Dequantised(y, each.flatten(1).sum(1).float())
