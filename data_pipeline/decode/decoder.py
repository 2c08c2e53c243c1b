"""What a decoder is, and which one to use."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from data_pipeline.augment import Size, Views, centre_views
from data_pipeline.decode.images import Picture
from data_pipeline.decode.pillow import PillowDecoder
from flows.errors import UserError


class Decoder(Protocol):
    """Image files to one tensor, in two steps: what is seen may depend on sizes.

    channels: of the images it makes
    redecoded: images so far that it could decode only in a second way
    """

    name: str
    channels: int
    redecoded: int

    def open(self, contents: Sequence[bytes], names: Sequence[str]) -> list[Picture]:
        """What the headers of image files say, quickly and with nothing decoded; for any thread.

        names: what to call each image in a message

        Raises BadImages naming all that are damaged or of a kind not read.
        """
        ...

    def decode(self, pictures: Sequence[Picture], views: Views) -> Tensor:
        """(batch, channels, *views.size) float32 in [-1, 1].

        Every decoder gives the same numbers for the same views: on CPUs to the bit, on a GPU to
        within rounding. The batch is the caller's to keep.

        Raises BadImages naming all images that are damaged.
        """
        ...

    def close(self) -> None: ...


def open_decoder(
    kind: Literal["auto", "dali", "pillow"],
    *,
    channels: int,
    threads: int,
    device: torch.device,
) -> Decoder:
    """A decoder by name.

    `auto` takes DALI where it is installed. It is the faster one from 8 x 8 PNG (by a tenth in
    batches of 64) to 512 x 512 JPEG (by a third), so size does not matter to the choice.

    device: DALI decodes on a CUDA device, and then the batch lies there; pillow's lies on the CPU
    """
    if kind != "pillow" and (kind == "dali" or dali_installed()):
        if not dali_installed():
            raise UserError(
                "data.decoder = dali, but DALI is not installed here; use pillow or auto"
            )
        # DALI is heavy and made for Linux alone.
        from data_pipeline.decode.dali import DaliDecoder

        return DaliDecoder(channels=channels, threads=threads, device=device)
    return PillowDecoder(channels=channels, threads=threads, pinned=device.type == "cuda")


def decode_middle(
    decoder: Decoder, contents: Sequence[bytes], names: Sequence[str], size: Size
) -> Tensor:
    """(batch, channels, *size): the middle of each image, as little cut off as `size` allows."""
    pictures = decoder.open(contents, names)
    return decoder.decode(pictures, centre_views([picture.size for picture in pictures], size))


def dali_installed() -> bool:
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError:
        return False
    return True
