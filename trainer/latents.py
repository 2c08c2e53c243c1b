"""Training on latents: what reads them in the place of images, and what makes images of them again."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.decode.decoder import Decoder, open_decoder
from data_pipeline.description import folder_of, read_description
from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.weights import fingerprint
from data_pipeline.latents import LatentDecoder, latents_of
from data_pipeline.shards import locate_embedded
from flows.errors import UserError
from trainer.recipe import Recipe

DECODED_AT_ONCE = 32  # latents in one call of the autoencoder: bounds memory


def open_reader(recipe: Recipe, urls: Sequence[str], device: torch.device) -> Decoder:
    """What makes tensors of the members of shards: a decoder of images, or a reader of latents."""
    data = recipe.data
    if data.latents:
        return LatentDecoder(latents_of(urls))
    return open_decoder(data.decoder, channels=data.channels, threads=data.threads, device=device)


def check_latents(recipe: Recipe, urls: Sequence[str]) -> None:
    """Raises UserError if the shards hold what the recipe does not say, or latents of other sizes."""
    data = recipe.data
    if not data.latents:
        for folder in {folder_of(url) for url in urls}:
            about = read_description(folder)
            if about is not None and about.latents is not None:
                raise UserError(f"{folder} holds latents and no images; set data.latents=true.")
        return
    latents = latents_of(urls)
    if latents.shape != (data.channels, data.image_size, data.image_size):
        channels, side, _ = latents.shape
        raise UserError(
            f"data.train holds latents of shape {latents.shape}, and the recipe has data.channels = "
            f"{data.channels} and data.image_size = {data.image_size}; set {channels} and {side}."
        )
    if data.autoencoder is not None and fingerprint(_folder(recipe)) != latents.autoencoder:
        raise UserError(
            f"data.autoencoder = {data.autoencoder} is not the one that made the latents of data.train; "
            "give that one, or encode again."
        )


def to_images(recipe: Recipe, samples: Tensor, device: torch.device) -> Tensor:
    """Images of what a model makes: its samples, or what the autoencoder makes of them; on the CPU.

    samples: (batch, channels, height, width) as a model is trained on them

    Raises UserError if they are latents and the recipe names no autoencoder.
    """
    if not recipe.data.latents:
        return samples.cpu()
    autoencoder = _open_autoencoder(_folder(recipe), device)
    return torch.cat([autoencoder.decode(part).cpu() for part in samples.split(DECODED_AT_ONCE)])


def _folder(recipe: Recipe) -> Path:
    if recipe.data.autoencoder is None:
        raise UserError(
            "This model makes latents, and only their autoencoder makes images of them; set "
            "data.autoencoder to its folder."
        )
    return Path(locate_embedded(recipe.data.autoencoder))


@lru_cache(1)
def _open_autoencoder(folder: Path, device: torch.device) -> Autoencoder:
    return Autoencoder(folder, precision="fp32", device=device)
