"""Features that images are compared by, all of them without any download.

Their names say what they are, for a distance of features means nothing without them. Images are
(n, channels, height, width) in [-1, 1], features (n, d) float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from flows.randomness import Draw

CONVNET_WIDTHS = (64, 128, 256)
CONVNET_SEED = 0
# Counts up when anything below changes what comes out.
CONVNET_VERSION = 1


@dataclass(frozen=True)
class Features:
    """name: as in `FD-<name>`; extract: images -> features, each image by itself."""

    name: str
    extract: Callable[[Tensor], Tensor]

    def of(self, images: Tensor, *, chunk: int) -> Tensor:
        """(n, d) float64, `chunk` images at a time."""
        return torch.cat([self.extract(part) for part in images.split(chunk)])


def pixels() -> Features:
    """The numbers of an image as they are."""
    return Features("pixels", lambda images: images.flatten(1).double())


def low_frequencies(count: int) -> Features:
    """The first `count` coefficients of each channel's orthonormal DCT-II, along its anti-diagonals.

    All of them if a channel has no more; then a Fréchet distance is that of pixels.
    """

    def extract(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        rows, columns = (cosines(n, images.device) for n in (height, width))
        coefficients = rows @ images.double() @ columns.T
        place = torch.arange(height * width, device=images.device)
        row, column = place // width, place % width
        # By anti-diagonal, and within one by row.
        order = ((row + column) * (height + width) + row).argsort()[:count]
        return coefficients.flatten(2)[:, :, order].flatten(1)

    return Features(f"dct{count}", extract)


def cosines(count: int, device: torch.device) -> Tensor:
    """(count, count) float64 orthonormal DCT-II: row k is cos(pi k (2 i + 1) / 2 count), scaled."""
    k = torch.arange(count, dtype=torch.float64, device=device)
    table: Tensor = torch.cos(math.pi / (2 * count) * k[:, None] * (2 * k + 1)) * math.sqrt(
        2 / count
    )
    table[0] /= math.sqrt(2)
    return table


def principal_components(train: Tensor, count: int) -> Features:
    """Projections on the directions in which training images vary most, centred on their mean.

    count: at most; there are no more than pixels, or images less one
    """
    x = train.flatten(1).double()
    mean = x.mean(0)
    count = min(count, x.shape[1], len(x) - 1)
    axes: Tensor = torch.linalg.svd(x - mean, full_matrices=False).Vh[:count]

    def extract(images: Tensor) -> Tensor:
        flat = images.flatten(1).double()
        return (flat - mean.to(flat.device)) @ axes.T.to(flat.device)

    return Features(f"pca{count}", extract)


def random_convnet(channels: int) -> Features:
    """A convolutional network that nobody trained: three stages of 3 x 3 convolution, ReLU and 2 x 2
    mean, then the mean over the image; orthogonal weights from a fixed seed.

    Its 256 features tell textures and shapes apart well enough to rank generators of the same images,
    and are the same numbers everywhere, for its weights are drawn by `flows.randomness`. The name
    holds their seed and version.
    """
    widths = (channels, *CONVNET_WIDTHS)
    weights = [
        orthogonal_filters(inputs, outputs, stage)
        for stage, (inputs, outputs) in enumerate(pairwise(widths))
    ]

    def extract(images: Tensor) -> Tensor:
        x = images.double()
        for weight in weights:
            x = F.conv2d(x, weight.to(x.device), padding=1).relu()
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return x.mean((2, 3))

    return Features(f"conv256-s{CONVNET_SEED}-v{CONVNET_VERSION}", extract)


def orthogonal_filters(inputs: int, outputs: int, stage: int) -> Tensor:
    """(outputs, inputs, 3, 3) float64 whose rows, or columns if these are fewer, are orthogonal, at the
    gain sqrt 2 that ReLU takes away (Saxe et al. 2014)."""
    index = torch.arange(outputs, device="cpu")
    normal = Draw(CONVNET_SEED, stage, index).normal("convnet", (9 * inputs,)).double()
    tall = normal if outputs >= 9 * inputs else normal.T
    basis, triangle = torch.linalg.qr(tall)
    # A triangle with a positive diagonal makes the factor unique.
    basis = basis * triangle.diagonal().sign()
    matrix: Tensor = basis if outputs >= 9 * inputs else basis.T
    return math.sqrt(2) * matrix.reshape(outputs, inputs, 3, 3)
