"""The prior of a flow that preserves volume: as wide in each dimension as the data it carries there."""

import torch
from torch import Tensor, nn

from data_pipeline.faults import Tolerance
from data_pipeline.loader import read_all
from data_pipeline.shards import search
from flows.batch import Batch
from flows.objectives.likelihood import Likelihood, prior_variance
from flows.randomness import Draw
from trainer.assembly import build_objective
from trainer.latents import open_reader
from trainer.recipe import Recipe
from trainer.storage import reach_storage

IMAGES = 1024  # that the variance is taken from: 4 % of error in a standard deviation at most
BATCH = 128


@torch.no_grad()
def measured_variance(flow: nn.Module, recipe: Recipe, device: torch.device) -> Tensor:
    """(tokens, features) float32 variance of z over the first training images, as they are trained on.

    It is a function of the weights and the data, so that no checkpoint holds it and every rank finds
    the same.
    """
    data, objective = recipe.data, build_objective(recipe)
    assert isinstance(objective, Likelihood)
    reach_storage(recipe)
    shards = [url for url, _ in recipe.data.sources]
    urls = [shard.url for pattern in shards for shard in search(pattern)[0]]
    decoder = open_reader(recipe, urls, torch.device("cpu"))
    try:
        images, labels = read_all(
            shards,
            decoder,
            size=(data.image_size, data.image_size),
            keep=data.keep,
            classes=data.classes,
            limit=IMAGES,
            batch=BATCH,
            tolerate=Tolerance(data.max_bad_fraction, None, None),
        )
    finally:
        decoder.close()
    whole = Batch(images, labels, torch.arange(len(images)))
    latents = []
    for batch in whole.split(BATCH):
        there = batch.to(device)
        ready = objective.prepare(there, Draw(recipe.seed, 0, there.position))
        latents.append(flow(**ready.inputs).z)
    return prior_variance(latents)
