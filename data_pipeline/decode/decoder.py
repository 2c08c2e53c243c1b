"""What a decoder is, and which one to use."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.decode.pillow import PillowDecoder
from flows.errors import UserError


class Decoder(Protocol):
    """Image files to one tensor; resized (shorter side, antialiased) and cut to a centre square."""

    name: str

    def decode(
        self, encoded: Sequence[bytes], *, flip: NDArray[np.bool_], names: Sequence[str]
    ) -> Tensor:
        """(batch, channels, image_size, image_size) float32 in [-1, 1].

        flip: (batch,) which images to mirror left to right
        names: what to call each image in a message

        Raises UserError naming an image that is damaged or of a kind not read.
        """
        ...

    def close(self) -> None: ...


def open_decoder(
    kind: Literal["auto", "dali", "pillow"],
    *,
    image_size: int,
    channels: int,
    threads: int,
    device: torch.device,
) -> Decoder:
    """A decoder by name; `auto` takes DALI where it is installed.

    device: DALI decodes on a CUDA device, and then the batch lies there; pillow's lies on the CPU
    """
    if kind != "pillow" and (kind == "dali" or dali_installed()):
        if not dali_installed():
            raise UserError(
                "data.decoder = dali, but DALI is not installed here; use pillow or auto"
            )
        # DALI is heavy and made for Linux alone.
        from data_pipeline.decode.dali import DaliDecoder

        return DaliDecoder(image_size=image_size, channels=channels, threads=threads, device=device)
    return PillowDecoder(image_size=image_size, channels=channels, threads=threads)


def dali_installed() -> bool:
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError:
        return False
    return True
