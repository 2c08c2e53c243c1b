"""What every decoder shares: which images are read at all, and how bytes become numbers."""

import io
import struct
import zlib

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flows.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
# Eight bits of grey or of red, green, blue: what all decoders read alike.
MODES = ("L", "RGB")
# What pillow raises for damaged content, by format and place of the damage.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def open_image(encoded: bytes, name: str) -> Image.Image:
    """The image with its header read and its pixels not yet.

    Raises UserError for another format, a damaged header, transparency, a palette, 16 bits, CMYK.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name}: its image ({len(encoded)} bytes) is not a PNG, JPEG or WebP with a whole "
            "header; replace or remove it"
        ) from error
    except DAMAGE as error:
        raise damaged(name, len(encoded), error) from error
    if image.mode not in MODES:
        raise UserError(
            f"{name}: an image of mode {image.mode} is not read, only 8-bit grey or RGB without "
            "transparency; convert it before packing"
        )
    return image


def damaged(name: str, size: int, error: Exception) -> UserError:
    what = str(error).split("<")[0].strip() or type(error).__name__
    return UserError(f"{name}: its image ({size} bytes) is damaged: {what}; replace or remove it")


def scale(pixels: Tensor) -> Tensor:
    """uint8 0 .. 255 to float32 -1 .. 1."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)
