"""How well a normalizing flow predicts images it never saw, in bits per dimension."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.batch import Batch
from flows.objectives.likelihood import Likelihood
from flows.randomness import Draw
from trainer.assembly import build_likelihood
from trainer.flow_sections import LikelihoodSection
from trainer.recipe import Recipe

BATCH = 256  # images in one network call: bounds memory, changes no figure


@dataclass(frozen=True)
class Bits:
    """Of held-out images, each with one draw of dequantisation noise.

    model: bits per dimension; for pixels a bound, for latents of a density, which may be negative
    error: one standard error of that mean over images
    count: images
    """

    model: float
    error: float
    count: int


def measured_objective(recipe: Recipe) -> Likelihood | None:
    """The recipe's objective without what is there for training alone; None if it has no likelihood.

    A flow of data with noise has a likelihood of such data alone, which says nothing of the data.
    """
    section = recipe.objective
    if not isinstance(section, LikelihoodSection) or section.noise:
        return None
    return replace(build_likelihood(recipe, section), label_drop=0.0, text_drop=None)


@torch.no_grad()
def heldout_bits(
    model: nn.Module, objective: Likelihood, images: Tensor, labels: Tensor, seed: int
) -> Bits:
    """Bits per dimension of (n, channels, height, width) images in [-1, 1] with their (n,) labels.

    The noise of image i is a function of (seed, i).
    """
    device = next(model.parameters()).device
    found = []
    for ids in torch.arange(len(images)).split(BATCH):
        batch = Batch(images[ids], labels[ids], ids).to(device)
        ready = objective.prepare(batch, Draw(seed, 0, batch.position))
        found.append(objective.bits(model(**ready.inputs)).double().cpu())
    bits = torch.cat(found)
    return Bits(bits.mean().item(), bits.std().item() / math.sqrt(len(bits)), len(bits))
