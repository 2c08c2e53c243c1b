"""How well a normalizing flow predicts images it never saw, in bits per dimension."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.batch import Batch
from flows.dequantisation import uniform_in_bin
from flows.metrics.mixture import gaussian_mixture_bits
from flows.objectives.likelihood import Likelihood
from flows.randomness import Draw
from trainer.assembly import build_likelihood
from trainer.flow_sections import LikelihoodSection
from trainer.recipe import Recipe

COMPONENTS = 5  # of the mixture of Gaussians for each pixel
BATCH = 256  # images in one network call: bounds memory, changes no figure


@dataclass(frozen=True)
class Bits:
    """Of held-out images, each with one draw of dequantisation noise.

    model: bits per dimension; for pixels a bound, for latents of a density, which may be negative
    error: one standard error of that mean over images
    mixture: the same of a mixture of Gaussians for each pixel by itself, fitted to training images
    components: of that mixture
    count: held-out images
    """

    model: float
    error: float
    mixture: float
    components: int
    count: int

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, value, to compare with) for a table."""
        beside = f"{self.mixture:.4f} of {self.components} Gaussians for each pixel by itself"
        value = f"{self.model:.4f} +- {self.error:.4f}"
        return [(f"bits per dimension of {self.count} held-out images", value, beside)]


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
    model: nn.Module,
    objective: Likelihood,
    train: Tensor,
    heldout: tuple[Tensor, Tensor],
    seed: int,
) -> Bits:
    """Bits per dimension of held-out images, by the model and by mixtures of Gaussians.

    train: (n, channels, height, width) images in [-1, 1]
    heldout: (m, channels, height, width) images and their (m,) labels

    The noise of image i is a function of (seed, i).
    """
    device = next(model.parameters()).device
    images, labels = heldout
    found = []
    for ids in torch.arange(len(images)).split(BATCH):
        batch = Batch(images[ids], labels[ids], ids).to(device)
        ready = objective.prepare(batch, Draw(seed, 0, batch.position))
        found.append(objective.bits(model(**ready.inputs)).double().cpu())
    bits = torch.cat(found)
    mixture = gaussian_mixture_bits(
        _in_bins(train, objective, seed),
        _in_bins(images, objective, seed),
        components=COMPONENTS,
        bin_width=objective.bin_width,
        seed=seed,
    )
    error = bits.std().item() / math.sqrt(len(bits))
    return Bits(bits.mean().item(), error, mixture.mean().item(), COMPONENTS, len(bits))


def _in_bins(images: Tensor, objective: Likelihood, seed: int) -> Tensor:
    """Images with uniform noise in the bins of their pixels; latents as they are."""
    if objective.levels is None:
        return images
    draw = Draw(seed, 0, torch.arange(len(images)))
    return uniform_in_bin(images, objective.levels, draw).y
