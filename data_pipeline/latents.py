"""Arrays as members of shards, and latents in the place of images."""

import io
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.augment import Views
from data_pipeline.decode.images import UPRIGHT, BadImages, Picture
from data_pipeline.description import Latents, folder_of, read_description
from data_pipeline.npy import read_npy
from flows.errors import UserError

TEXT, POOLED = "text.npy", "pooled.npy"


def write_array(values: NDArray[np.generic]) -> bytes:
    """A `.npy` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def read_array(content: bytes, name: str) -> NDArray[np.floating]:
    """The numbers of a `.npy` file, not copied; raises UserError naming it if it is damaged."""
    try:
        values = read_npy(content)
        if values.dtype.kind != "f" or not values.flags.c_contiguous:
            raise ValueError(f"its numbers are {values.dtype}, or not in order")
    except ValueError as error:
        raise UserError(
            f"{name}: its array ({len(content)} bytes) is damaged: {error}; encode its shard again"
        ) from error
    return values


def latents_of(urls: Sequence[str]) -> Latents:
    """What the latents in some shards are, by the `dataset.json` beside them.

    Raises UserError if that is missing, or says different things in different folders.
    """
    found: dict[str, Latents] = {}
    shards: defaultdict[str, set[str]] = defaultdict(set)
    for url in urls:
        shards[folder_of(url)].add(url.rpartition("/")[2])
    for folder, names in sorted(shards.items()):
        description = read_description(folder)
        if description is None or description.latents is None:
            raise UserError(
                f"{folder}: has no dataset.json that describes latents; make the shards by `flowmill "
                "data encode`, and let it end"
            )
        if strange := sorted(names - description.shards.keys()):
            raise UserError(
                f"{folder}/{strange[0]}: is none of the shards that dataset.json describes; encode it "
                "like them, or leave it out"
            )
        found[folder] = description.latents
    first, *others = found
    for other in others:
        if _alike(found[first]) != _alike(found[other]):
            raise UserError(
                f"{other}: its latents were not made as those in {first}; encode both alike"
            )
    return found[first]


def _alike(latents: Latents) -> dict[str, object]:
    return latents.model_dump(exclude={"mean", "std"})


class LatentDecoder:
    """A `Decoder` of latents: they are read, not computed, and cannot be mirrored or cut."""

    name = "latents"
    redecoded = 0

    def __init__(self, latents: Latents) -> None:
        self.latents = latents
        self.channels = latents.shape[0]

    def open(self, contents: Sequence[bytes], names: Sequence[str]) -> list[Picture]:
        """Latents are read at once; raises BadImages for those damaged or of another shape."""
        _, height, width = self.latents.shape
        self._read_all(contents, names)
        return [
            Picture(content, name, height, width, mode=self.name, turn=UPRIGHT, plain=False)
            for content, name in zip(contents, names, strict=True)
        ]

    def decode(self, pictures: Sequence[Picture], views: Views) -> Tensor:
        """(batch, channels, height, width) float32 latents, shifted and scaled for a model.

        Raises UserError for views that are not the whole latent as it is.
        """
        height, width = self.latents.shape[1:]
        whole = (views.region == (0, 0, height, width)).all() and views.size == (height, width)
        if views.flip.any() or not whole:
            raise UserError(
                "latents cannot be mirrored, cut or resized; set data.augment.flip = 0, "
                f"data.augment.crop = centre and data.image_size = {height}"
            )
        read = self._read_all([one.content for one in pictures], [one.name for one in pictures])
        stacked = torch.from_numpy(np.stack(read).astype(np.float32))
        return scaled(stacked, shift=self.latents.shift, scale=self.latents.scale)

    def close(self) -> None: ...

    def _read_all(
        self, contents: Sequence[bytes], names: Sequence[str]
    ) -> list[NDArray[np.floating]]:
        read: list[NDArray[np.floating]] = []
        errors: dict[int, UserError] = {}
        for place, (content, name) in enumerate(zip(contents, names, strict=True)):
            try:
                read.append(self._read(content, name))
            except UserError as error:
                errors[place] = error
        if errors:
            raise BadImages(errors)
        return read

    def _read(self, content: bytes, name: str) -> NDArray[np.floating]:
        values = read_array(content, name)
        if values.shape != self.latents.shape:
            raise UserError(
                f"{name}: its latent has shape {values.shape}, and dataset.json says "
                f"{self.latents.shape}; encode its shard again"
            )
        return values


def scaled(latents: Tensor, *, shift: float, scale: float) -> Tensor:
    """Latents as a model is trained on them."""
    return (latents - shift) * scale


def unscaled(latents: Tensor, *, shift: float, scale: float) -> Tensor:
    """The inverse of `scaled`."""
    return latents / scale + shift
