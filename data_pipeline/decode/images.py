"""What every decoder shares: which images are read, and what their headers say.

The kinds of image and what becomes of each stand in a table in docs/data-formats.md.
"""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from data_pipeline.decode.jpeg import END, read_plain
from flows.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP")
# Eight bits of grey or of red, green, blue: what all decoders read to the same bits.
PLAIN = ("L", "RGB")
# A quarter of a gigabyte as RGB, and the size above which pillow suspects an image bomb.
MOST_PIXELS = 89_478_485
# The values of EXIF's orientation, and what turns each upright.
UPRIGHT = 1
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIRST_ON_ITS_SIDE = 5
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


class Picture(NamedTuple):
    """An image file whose header has been read.

    name: what to call it in a message
    height, width: pixels of the upright image
    mode: pillow's word for what a pixel holds
    turn: how it is stored, as EXIF numbers it; 1 is upright
    plain: 8-bit grey or RGB, opaque and upright as stored: every decoder reads it alike
    """

    content: bytes
    name: str
    height: int
    width: int
    mode: str
    turn: int
    plain: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


class BadImages(UserError):
    """Some images of a batch cannot be decoded; the message is about the first of them.

    errors: place in the batch, ascending -> what is wrong with that image
    """

    def __init__(self, errors: Mapping[int, UserError]) -> None:
        super().__init__(str(errors[min(errors)]))
        self.errors = dict(sorted(errors.items()))


def read_pictures(contents: Sequence[bytes], names: Sequence[str]) -> list[Picture]:
    """The headers of a batch of image files; raises BadImages for those that are not read."""
    pictures: list[Picture] = []
    errors: dict[int, UserError] = {}
    for place, (content, name) in enumerate(zip(contents, names, strict=True)):
        try:
            pictures.append(read_picture(content, name))
        except UserError as error:
            errors[place] = error
    if errors:
        raise BadImages(errors)
    return pictures


def read_picture(content: bytes, name: str) -> Picture:
    """The header of an image file.

    Raises UserError if it is of another format, cut off, animated, too large, or of a kind not read.
    """
    plain = read_plain(content)
    if plain is None or plain[0] * plain[1] > MOST_PIXELS:
        return read_any(content, name)
    height, width, mode = plain
    return Picture(content, name, height, width, mode, UPRIGHT, plain=True)


def read_any(content: bytes, name: str) -> Picture:
    """See `read_picture`; by pillow."""
    image = _open(content, name)
    turn = _orientation(image)
    width, height = image.size if turn < FIRST_ON_ITS_SIDE else image.size[::-1]
    plain = turn == UPRIGHT and _is_plain(image, content)
    return Picture(content, name, height, width, image.mode, turn, plain)


def load(picture: Picture) -> Image.Image:
    """The whole image, upright, in the mode it is stored in; raises UserError if it is damaged."""
    try:
        image = Image.open(io.BytesIO(picture.content), formats=FORMATS)
        image.load()
    except DAMAGE as error:
        raise _damaged(picture.name, picture.content, error) from error
    return image if picture.turn == UPRIGHT else image.transpose(TURNS[picture.turn])


def _open(content: bytes, name: str) -> ImageFile.ImageFile:
    """The image as stored, with its header read and its pixels not yet; raises as `read_picture`."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name}: its image ({len(content)} bytes) is not a PNG, JPEG or WebP with a whole "
            "header; replace or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(name) from error
    except DAMAGE as error:
        raise _damaged(name, content, error) from error
    if image.width * image.height > MOST_PIXELS:
        raise _too_large(name)
    # A photograph with smaller versions of itself behind it is also several images: its first.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise UserError(f"{name}: its image is an animation; keep one frame of it, or remove it")
    if not _has_end(image, content):
        raise _damaged(name, content, ValueError("cut off before its end mark"))
    return image


def _orientation(image: Image.Image) -> int:
    """How the stored image lies (EXIF 1 .. 8); 1, upright, where that is not said legibly."""
    try:
        # PNG's own method would decode the whole image first.
        turn = Image.Image.getexif(image).get(ExifTags.Base.Orientation, UPRIGHT)
    except DAMAGE:
        return UPRIGHT
    return turn if turn in TURNS else UPRIGHT


def _damaged(name: str, content: bytes, error: Exception) -> UserError:
    what = str(error).split("<")[0].strip() or type(error).__name__
    return UserError(
        f"{name}: its image ({len(content)} bytes) is damaged: {what}; replace or remove it"
    )


def _too_large(name: str) -> UserError:
    return UserError(
        f"{name}: its image has more than {MOST_PIXELS:,} pixels and would fill the memory; scale it "
        "down before packing, or remove it"
    )


def _is_plain(image: ImageFile.ImageFile, content: bytes) -> bool:
    if image.mode not in PLAIN or "transparency" in image.info:
        return False
    if image.format == "WEBP":
        # DALI reads the simple format alone, not the extended one with room for EXIF and profiles.
        return content[12:16] != b"VP8X"
    # PNG has grey of fewer bits than eight and colours of sixteen, which pillow turns into eight.
    return image.format == "JPEG" or image.tile[0].args == image.mode


def _has_end(image: ImageFile.ImageFile, content: bytes) -> bool:
    """Whether the mark that ends every JPEG and PNG is there; pillow itself minds that of WebP."""
    if image.format == "PNG":
        return content.rfind(b"IEND") >= 0
    if image.format == "WEBP":
        return True
    # Only behind the header, as a small picture inside it has such a mark too.
    begin = image.fp.tell() if image.fp else 0
    return content.rfind(END, begin) >= 0
