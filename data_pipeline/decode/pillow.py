"""Decoding with pillow, on any machine and any kind of image; a few threads, as pillow frees the
interpreter while it works.

JPEG is always decoded in full: pillow's `draft`, which decodes to a half or a quarter of the size,
is faster and differs from the full size resized by tens of levels.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline.augment import Views
from data_pipeline.decode.finish import Buffers, Pixels, finish
from data_pipeline.decode.images import PLAIN, BadImages, Picture, load, read_pictures
from flows.errors import UserError

MODE_OF_CHANNELS = {1: "L", 3: "RGB"}


class PillowDecoder:
    """See `Decoder`; the batch lies on the CPU."""

    name = "pillow"
    redecoded = 0

    def __init__(self, *, channels: int, threads: int, pinned: bool) -> None:
        """pinned: batches lie in memory that a CUDA device copies from without waiting"""
        self.channels = channels
        self.threads = threads
        self.buffers = Buffers(pinned=pinned)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def open(self, contents: Sequence[bytes], names: Sequence[str]) -> list[Picture]:
        return read_pictures(contents, names)

    def decode(self, pictures: Sequence[Picture], views: Views) -> Tensor:
        batch = self.buffers.take((len(pictures), self.channels, *views.size))
        self.fill(batch, pictures, views, range(len(pictures)))
        return batch

    def fill(
        self, batch: Tensor, pictures: Sequence[Picture], views: Views, places: Sequence[int]
    ) -> None:
        """Decode the pictures at `places` into their rows of a batch; raises BadImages."""
        rows = batch.numpy()
        errors: dict[int, UserError] = {}

        def work(places: Iterable[int]) -> None:
            for place in places:
                try:
                    pixels = decode_region(
                        pictures[place], views.region[place].tolist(), self.channels
                    )
                except UserError as error:
                    errors[place] = error
                else:
                    finish(pixels, flip=bool(views.flip[place]), row=rows[place])

        self.share(work, places)
        if errors:
            raise BadImages(errors)

    def share(self, work: Callable[[Sequence[int]], None], places: Sequence[int]) -> None:
        """Do some work on `places`, dealt out to the threads."""
        parts = [places[thread :: self.threads] for thread in range(self.threads)]
        # Going through the results raises what a thread raised.
        list(self._pool.map(work, [part for part in parts if part]))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def decode_region(picture: Picture, region: Sequence[int], channels: int) -> Pixels:
    """(height, width, channels) of what is seen; raises UserError if the image is damaged.

    region: top, left, height, width in the upright image
    """
    top, left, height, width = region
    image = load(picture)
    if (height, width) != picture.size:
        image = image.crop((left, top, left + width, top + height))
    image = to_plain(image)
    if image.mode != (mode := MODE_OF_CHANNELS[channels]):
        image = image.convert(mode)
    return np.array(image).reshape(height, width, channels)


def to_plain(image: Image.Image) -> Image.Image:
    """Eight bits of grey or RGB: the high bytes of sixteen bits, and what is clear upon white."""
    clear = image.info.get("transparency")
    if image.mode == "I;16":
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        return Image.fromarray(grey if clear is None else np.where(values == clear, 255, grey))
    if image.mode in ("LA", "RGBA") or clear is not None:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if image.mode in PLAIN else image.convert("RGB")
