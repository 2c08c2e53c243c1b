"""The prior of a flow that preserves volume: as wide in each dimension as the data it carries there."""

import torch
from torch import Tensor, nn

from flows.batch import Batch
from flows.objectives.likelihood import Likelihood, prior_variance
from flows.randomness import Draw
from trainer.assembly import build_objective
from trainer.real_images import read_real
from trainer.recipe import Recipe

IMAGES = 1024  # that the variance is taken from: 4 % of error in a standard deviation at most
BATCH = 128


@torch.no_grad()
def measured_variance(model: nn.Module, recipe: Recipe, device: torch.device) -> Tensor:
    """(tokens, features) float32 variance of z over the first training images, as they are trained on.

    It is a function of the weights and the data, so that no checkpoint holds it and every rank finds
    the same.

    model: the flow, with its dequantiser if it has one
    """
    objective = build_objective(recipe)
    assert isinstance(objective, Likelihood)
    images, labels = read_real(recipe, [url for url, _ in recipe.data.sources], None, IMAGES)
    whole = Batch(images, labels, torch.arange(len(images)))
    latents = []
    for batch in whole.split(BATCH):
        there = batch.to(device)
        ready = objective.prepare(there, Draw(recipe.seed, 0, there.position))
        latents.append(model(**ready.inputs).z)
    return prior_variance(latents)
