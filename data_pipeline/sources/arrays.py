"""Images in arrays: an `.npz` file with `images` and `labels`, and scikit-learn's 8x8 digits."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.description import Description
from data_pipeline.npy import DAMAGE
from data_pipeline.sources.source import Sample
from flows.errors import UserError

# The 8x8 digits hold 0 .. 16; spread over a byte, `round(v * 16 / 255)` gives them back.
DIGITS8_LEVELS = 16


class ArraySource:
    """Samples of an array, written as PNG.

    images: (samples, height, width) or (samples, height, width, 3) uint8
    labels: (samples,) integers
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> None:
        self.images = images
        self.labels = labels
        self.about = Description()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Sample:
        label = str(int(self.labels[number])).encode()
        return Sample(f"{number:06d}", {"png": encode_png(self.images[number]), "cls": label})


def open_npz(path: str) -> ArraySource:
    """The arrays `images` and `labels` of an `.npz` file; raises UserError if they do not fit."""
    try:
        with np.load(Path(path), allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (*DAMAGE, ValueError, TypeError) as error:
        # A .npy file is an array, in which nothing has a name; NumPy goes on to advise reading pickles.
        single = isinstance(error, TypeError)
        reason = "it is one array" if single else str(error).partition(". ")[0]
        raise UserError(
            f"{path}: not an .npz file with plain arrays `images` and `labels` ({reason}); write one "
            "by numpy.savez_compressed"
        ) from error
    grey, colour = images.ndim == 3, images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (grey or colour):
        raise UserError(
            f"{path}: images are {images.dtype} {images.shape}; give uint8 (samples, height, "
            "width) or (samples, height, width, 3)"
        )
    if 0 in images.shape[1:]:
        raise UserError(
            f"{path}: images are {images.shape}, without a pixel; give a side of 1 or more"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: labels are {labels.dtype} {labels.shape}; give one integer an image"
        )
    return ArraySource(images, labels)


def open_digits8() -> ArraySource:
    """1,797 handwritten digits, 8x8 pixels of 17 grey levels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / DIGITS8_LEVELS)).astype(np.uint8)
    return ArraySource(images, digits.target)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
