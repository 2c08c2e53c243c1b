"""What enters a transformer: patches of an image, their places, the flow time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BASE = 10_000.0


def patchify(image: Tensor, patch: int) -> Tensor:
    """(batch, channels, height, width) -> (batch, tokens, patch * patch * channels).

    Tokens in raster order; the features of a token are ordered (row, column, channel).
    """
    batch, channels, height, width = image.shape
    grid = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: Tensor, patch: int, height: int) -> Tensor:
    """The inverse of `patchify` for images `height` pixels high."""
    batch, count, features = tokens.shape
    rows = height // patch
    grid = tokens.reshape(batch, rows, count // rows, patch, patch, features // patch**2)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, count // rows * patch)


def sincos_positions(side: int, width: int) -> Tensor:
    """(side * side, width) float32 table of a square grid in raster order.

    The first half of the features encodes the column and the second the row, each as [sin | cos]
    with frequencies 10000^(-j / (width / 4)). Computed in float64 on the CPU for every device.
    """
    quarter = width // 4
    frequency = BASE ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    place = torch.arange(side, dtype=torch.float64, device="cpu")
    angle = place[:, None] * frequency
    axis = torch.cat((angle.sin(), angle.cos()), dim=1)
    column = axis.repeat(side, 1)
    row = axis.repeat_interleave(side, dim=0)
    return torch.cat((column, row), dim=1).float()


class TimeEmbedding(nn.Module):
    """[cos | sin] of the flow time at 128 frequencies, then linear, SiLU, linear."""

    features = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(self.features, width)
        self.out = nn.Linear(width, width)

    def sinusoid(self, t: Tensor) -> Tensor:
        """(batch,) times in [0, 1], taken as they are -> (batch, 256) in float32."""
        half = self.features // 2
        place = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(place * (-math.log(BASE) / half))
        return torch.cat((angle.cos(), angle.sin()), dim=1)

    def forward(self, t: Tensor) -> Tensor:
        """(batch,) -> (batch, width), in the dtype of the weights."""
        hidden = F.silu(self.up(self.sinusoid(t).to(self.up.weight.dtype)))
        embedding: Tensor = self.out(hidden)
        return embedding


class VectorEmbedding(nn.Module):
    """Linear, SiLU, linear of one vector a sample."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, width)
        self.out = nn.Linear(width, width)

    def forward(self, vector: Tensor) -> Tensor:
        """(batch, features) -> (batch, width), in the dtype of the weights."""
        hidden = F.silu(self.up(vector.to(self.up.weight.dtype)))
        embedding: Tensor = self.out(hidden)
        return embedding


def mean_of_rows(text: Tensor) -> Tensor:
    """(batch, width) mean of the rows of text (batch, tokens, width) that are not all zero.

    Rows of zeros are padding, and a text of nothing else, as training drops it, has the mean zero.
    """
    count = text.any(-1).sum(-1, keepdim=True).clamp(min=1)
    return text.sum(1) / count
