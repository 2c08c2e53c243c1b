"""Real images of a recipe's shards, as it trains on them, held in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_pipeline.faults import PastShard, Tolerance
from data_pipeline.file_order import read_all
from data_pipeline.shards import search
from trainer.latents import open_reader
from trainer.recipe import Recipe
from trainer.storage import reach_storage

DECODED_AT_ONCE = 256


def read_real(
    recipe: Recipe,
    shards: list[str],
    past: Sequence[PastShard] | None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Images, or latents, and labels of `shards`, decoded as the training decodes them.

    past: the shards as the training began with them
    limit: the first so many; None: all
    """
    data = recipe.data
    reach_storage(recipe)
    urls = [shard.url for pattern in shards for shard in search(pattern)[0]]
    decoder = open_reader(recipe, urls, torch.device("cpu"))
    try:
        return read_all(
            shards,
            decoder,
            size=(data.image_size, data.image_size),
            keep=data.keep,
            classes=data.classes,
            limit=limit,
            batch=DECODED_AT_ONCE,
            tolerate=Tolerance(data.max_bad_fraction, None, past),
        )
    finally:
        decoder.close()
