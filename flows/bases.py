"""Paths that begin at something made of the image: a part of it, or less of its detail.

x0 = m(x1) + sigma z in place of pure noise (Albergo et al. 2023, "Stochastic interpolants with
data-dependent couplings"). The network then learns to complete or to sharpen: sampling begins at what
is given (`flows/samplers/completion.py`).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from flows.randomness import Draw


class Base(Protocol):
    """(image (batch, channels, height, width), draw of its samples) -> where its paths begin."""

    def __call__(self, image: Tensor, draw: Draw) -> Tensor: ...


@dataclass(frozen=True)
class Inpainting:
    """Tiles of the image are seen, the others are noise: where it is seen, nothing moves.

    tile: side of a tile in pixels
    seen: share of tiles that are seen
    """

    tile: int
    seen: float

    def mask(self, image: Tensor, draw: Draw) -> Tensor:
        """(batch, 1, height, width) bool: True where the image is seen."""
        height, width = image.shape[-2:]
        grid = (1, -(-height // self.tile), -(-width // self.tile))
        seen = draw.uniform("seen", grid) < self.seen
        tall = seen.repeat_interleave(self.tile, 2).repeat_interleave(self.tile, 3)
        return tall[:, :, :height, :width]

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        noise = draw.normal("noise", tuple(image.shape[1:]))
        return torch.where(self.mask(image, draw), image, noise)


@dataclass(frozen=True)
class SuperResolution:
    """The image without its detail, and a little noise.

    factor: pixels a side that become one
    noise: its standard deviation; without any, equal images of few pixels could not become different
        ones
    """

    factor: int
    noise: float

    def coarse(self, image: Tensor) -> Tensor:
        """Means over squares of `factor` x `factor` pixels, as large as the image."""
        small = F.avg_pool2d(image, self.factor)
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)

    def __call__(self, image: Tensor, draw: Draw) -> Tensor:
        noise = draw.normal("noise", tuple(image.shape[1:]))
        return self.coarse(image) + self.noise * noise
