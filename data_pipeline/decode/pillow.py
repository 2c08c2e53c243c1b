"""Decoding with pillow, on any machine: a few threads, as pillow frees the interpreter while it
works."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from data_pipeline.decode.images import DAMAGE, damaged, open_image, scale

MODE_OF_CHANNELS = {1: "L", 3: "RGB"}


class PillowDecoder:
    """See `Decoder`; the batch lies on the CPU."""

    name = "pillow"

    def __init__(self, *, image_size: int, channels: int, threads: int) -> None:
        self.image_size = image_size
        self.channels = channels
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def decode(
        self, encoded: Sequence[bytes], *, flip: NDArray[np.bool_], names: Sequence[str]
    ) -> Tensor:
        pixels = np.stack(list(self._pool.map(self._decode_one, encoded, flip.tolist(), names)))
        return scale(torch.from_numpy(pixels))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _decode_one(self, encoded: bytes, flip: bool, name: str) -> NDArray[np.uint8]:
        """(channels, image_size, image_size)"""
        image = load(encoded, name).convert(MODE_OF_CHANNELS[self.channels])
        pixels = np.asarray(centre_square(image, self.image_size))
        pixels = pixels.reshape(self.image_size, self.image_size, self.channels)
        return (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)


def load(encoded: bytes, name: str) -> Image.Image:
    """The whole image, upright; raises UserError if any of it is damaged."""
    image = open_image(encoded, name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except DAMAGE as error:
        raise damaged(name, len(encoded), error) from error


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to `size`, antialiased, and the middle of the longer one kept."""
    width, height = image.size
    if min(width, height) != size:
        shorter = min(width, height)
        width, height = (int(side * size / shorter + 0.5) for side in (width, height))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
