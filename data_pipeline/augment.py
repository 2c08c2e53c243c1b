"""What is seen of each image: a rectangle of its pixels, resized, perhaps mirrored.

All of it is decided before decoding, from the image's size and its place in the stream alone, so it
is the same whatever rank decodes the image, with what, and beside which others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from flows.randomness import Draw

Size = tuple[int, int]
Region = tuple[int, int, int, int]


@dataclass(frozen=True)
class Augment:
    """How images may be changed.

    crop: "centre", the largest rectangle of the target's shape in the middle; or "random"
    scale: smallest and largest share of the image's area that a random crop shows
    aspect: smallest and largest width over height of a random crop, in units of the target's
    flip: probability of a mirror image
    """

    crop: Literal["centre", "random"]
    scale: tuple[float, float]
    aspect: tuple[float, float]
    flip: float


@dataclass(frozen=True)
class Views:
    """What to make of a few images.

    size: (height, width) of every result
    region: (batch, 4) int32 top, left, height, width of what is seen, in pixels of the upright
        image, within it
    flip: (batch,) which are mirrored left to right
    """

    size: Size
    region: NDArray[np.int32]
    flip: NDArray[np.bool_]

    def __getitem__(self, places: Sequence[int]) -> "Views":
        """The views of some of the images."""
        return Views(self.size, self.region[places], self.flip[places])


def centre_views(sizes: Sequence[Size], target: Size) -> Views:
    """The middle of images of (height, width) `sizes`, as little cut off as the target allows."""
    regions = [centre_region(size, target) for size in sizes]
    return Views(target, _regions(regions), np.zeros(len(sizes), np.bool_))


def draw_views(
    sizes: Sequence[Size], target: Size, augment: Augment, *, seed: int, positions: torch.Tensor
) -> Views:
    """What is seen of images of (height, width) `sizes`.

    positions: (batch,) int64 places in the endless stream, so a sample may differ between epochs
    """
    # The stream has no steps: a place in it is visited once.
    draw = Draw(seed, 0, positions)
    if augment.crop == "centre":
        regions = [centre_region(size, target) for size in sizes]
    else:
        numbers = draw.uniform("crop", (4,)).tolist()
        regions = [
            random_region(size, target, augment, four)
            for size, four in zip(sizes, numbers, strict=True)
        ]
    if augment.flip == 0:
        flip = np.zeros(len(sizes), np.bool_)
    else:
        flip = (draw.uniform("flip") < augment.flip).numpy()
    return Views(target, _regions(regions), flip)


def centre_region(size: Size, target: Size) -> Region:
    """The largest rectangle of the target's shape, in the middle, to the nearest pixel."""
    height, width = _largest(size, target[1] / target[0])
    return (size[0] - height) // 2, (size[1] - width) // 2, height, width


def random_region(size: Size, target: Size, augment: Augment, uniform: Sequence[float]) -> Region:
    """A rectangle of random area, shape and place, as Szegedy et al. 2015 ("Going deeper with
    convolutions", section 6) crop, to the nearest pixel.

    uniform: four numbers in (0, 1). The first picks the area, evenly; the second the logarithm of
        the aspect, evenly among those at which that area fits into the image; the others the place.
        If no allowed aspect fits, the largest rectangle of the best allowed one is taken.

    One sample at a time, in plain Python: vectorised exponentials may round the last numbers of an
    array differently, and then a crop would depend on its neighbours.
    """
    rows, columns = size
    low, high = augment.scale
    area = (low + (high - low) * uniform[0]) * rows * columns
    lowest, highest = (bound * target[1] / target[0] for bound in augment.aspect)
    narrowest, widest = max(lowest, area / rows**2), min(highest, columns**2 / area)
    if narrowest <= widest:
        aspect = narrowest * math.exp(math.log(widest / narrowest) * uniform[1])
        height = _within(math.sqrt(area / aspect), rows)
        width = _within(math.sqrt(area * aspect), columns)
    else:
        height, width = _largest(size, min(max(columns / rows, lowest), highest))
    top = int(uniform[2] * (rows - height + 1))
    left = int(uniform[3] * (columns - width + 1))
    return top, left, height, width


def _largest(size: Size, aspect: float) -> Size:
    """The largest rectangle with this width over height that fits into `size`."""
    height = _within(size[1] / aspect, size[0])
    width = _within(size[0] * aspect, size[1])
    return height, width


def _within(length: float, most: int) -> int:
    return min(max(int(length + 0.5), 1), most)


def _regions(regions: Sequence[Region]) -> NDArray[np.int32]:
    return np.array(regions, np.int32).reshape(-1, 4)
