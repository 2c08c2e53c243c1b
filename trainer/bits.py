"""How well a model predicts images it never saw, in bits per dimension."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.batch import Batch
from flows.dequantisation import Levels, uniform_in_bin
from flows.errors import UserError
from flows.likelihood import bits_of_data
from flows.metrics.mixture import gaussian_mixture_bits
from flows.objectives.likelihood import Likelihood
from flows.randomness import Draw
from trainer.assembly import build_flow_matching, build_likelihood
from trainer.drawing import velocity_of
from trainer.flow_sections import LikelihoodSection
from trainer.recipe import Recipe
from trainer.velocity_sections import ObjectiveSection

# Of images of 8 bits, where no recipe says how many there are.
LEVELS = Levels(256, "around")
# Images in one solve, whose steps suit the worst of them.
SOLVED_AT_ONCE = 32
COMPONENTS = 5  # of the mixture of Gaussians for each pixel
BATCH = 256  # images in one network call: bounds memory, changes no figure


@dataclass(frozen=True)
class Bits:
    """Of held-out images or latents, each with one draw of the noise that the model was trained with, or
    that fills the bins of its pixels.

    model: bits per dimension; of discrete pixels a bound, else of a density, which may be negative
    error: one standard error of that mean over images
    mixture: the same of a mixture of Gaussians for each pixel by itself, fitted to training images
    components: of that mixture
    count: held-out images
    what: images or latents
    noise: standard deviation of the Gaussian noise on them; 0 for none
    least: bits of that noise alone, below which no density of noisy data can be; None for none
    """

    model: float
    error: float
    mixture: float
    components: int
    count: int
    what: str
    noise: float
    least: float | None

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, value, to compare with) for a table."""
        of = f"{self.count} held-out {self.what}"
        beside = f"{self.mixture:.4f} of {self.components} Gaussians for each pixel by itself"
        if self.least is not None:
            of = f"the density of {of} with noise of {self.noise:g}"
            beside += f"; {self.least:.4f} of the noise alone"
        elif self.what == "latents":
            of = f"the density of {of}"
        return [(f"bits per dimension of {of}", f"{self.model:.4f} +- {self.error:.4f}", beside)]


def measured_objective(recipe: Recipe) -> Likelihood | None:
    """The recipe's objective without what is there for guidance; None if it has no likelihood.

    A flow of data with Gaussian noise has a likelihood of such data alone, and is measured on them. One
    of pixels with neither that nor filled bins has none: a density of single values has no bound.
    """
    section = recipe.objective
    if not isinstance(section, LikelihoodSection):
        return None
    objective = replace(build_likelihood(recipe, section), label_drop=0.0, text_drop=None)
    bare = objective.levels is not None and objective.dequantisation == "none"
    return None if bare and not objective.noise else objective


@torch.no_grad()
def heldout_bits(
    model: nn.Module,
    objective: Likelihood,
    train: Tensor,
    heldout: tuple[Tensor, Tensor],
    seed: int,
    variance: Tensor | None = None,
) -> Bits:
    """Bits per dimension of held-out images, by the model and by mixtures of Gaussians.

    train: (n, channels, height, width) images in [-1, 1], or latents
    heldout: (m, channels, height, width) images and their (m,) labels
    variance: (tokens, features) of the prior of a flow that preserves volume, where the model is; None for 1

    The noise of image i is a function of (seed, i).
    """
    device = next(model.parameters()).device
    images, labels = heldout
    found = []
    for ids in torch.arange(len(images)).split(BATCH):
        batch = Batch(images[ids], labels[ids], ids).to(device)
        ready = objective.prepare(batch, Draw(seed, 0, batch.position))
        found.append(objective.bits(model(**ready.inputs), variance).double().cpu())
    mixture = gaussian_mixture_bits(
        _with_noise(train, objective, seed, step=1),  # fitted to other noise than it is tried on
        _with_noise(images, objective, seed, step=0),
        components=COMPONENTS,
        bin_width=objective.bin_width,
        seed=seed,
    )
    what = "images" if objective.levels else "latents"
    return _beside(torch.cat(found), mixture, what, objective.noise)


def check_solved(recipe: Recipe) -> None:
    """Raises UserError for a model whose bits no differential equation tells, see `solved_bits`."""
    section = recipe.objective
    if isinstance(section, LikelihoodSection):
        raise UserError(
            f"model.family = {recipe.model.family} has a likelihood of its own, which is found for all "
            "held-out images; leave --bits out."
        )
    if not isinstance(section, ObjectiveSection) or section.base.kind != "noise":
        raise UserError(
            "--bits follows a differential equation from data to noise, and this model has none; leave "
            "it out."
        )
    if recipe.data.text is not None:
        raise UserError(
            "--bits tells a model the classes of held-out images, and this one reads captions; leave it out."
        )


def solved_bits(
    model: nn.Module,
    recipe: Recipe,
    train: Tensor,
    heldout: tuple[Tensor, Tensor],
    count: int,
    report: Callable[[int, int], None],
) -> Bits:
    """Bits per dimension of the first `count` held-out images, by the equation that a flow-matching model
    samples with, and by mixtures of Gaussians.

    Each with its class, without guidance; with one random vector for the divergence, and one draw of noise
    that fills the bins of its pixels. The other arguments are those of `heldout_bits`.

    report: called with how many images are done, and how many there are
    """
    objective, device = build_flow_matching(recipe), next(model.parameters()).device
    support = objective.path.support(objective.prediction, sampling=True)
    levels = None if recipe.data.latents else LEVELS
    images, labels = (part[:count] for part in heldout)
    found = []
    for ids in torch.arange(len(images)).split(SOLVED_AT_ONCE):
        solved = bits_of_data(
            velocity_of(model, objective),
            images[ids].to(device),
            {"label": labels[ids].to(device)},
            ids.to(device),
            levels=levels,
            dequantisation="uniform",
            path=objective.path,
            times=[support.low, support.high],
            solver="dopri5",
            divergence="hutchinson",
            seed=recipe.seed,
        )
        found.append(solved.bits.cpu())
        report(int(ids[-1]) + 1, len(images))
    fitted, tried = (
        part if levels is None else _filled(part, levels, recipe.seed, step)
        for step, part in ((1, train), (0, images))
    )
    width = 1.0 if levels is None else levels.width
    mixture = gaussian_mixture_bits(
        fitted, tried, components=COMPONENTS, bin_width=width, seed=recipe.seed
    )
    what = "latents" if levels is None else "images"
    return _beside(torch.cat(found), mixture, what)


def _filled(images: Tensor, levels: Levels, seed: int, step: int) -> Tensor:
    return uniform_in_bin(images, levels, Draw(seed, step, torch.arange(len(images)))).y


def _beside(bits: Tensor, mixture: Tensor, what: str, noise: float = 0.0) -> Bits:
    return Bits(
        model=bits.mean().item(),
        error=bits.std().item() / math.sqrt(len(bits)),
        mixture=mixture.mean().item(),
        components=COMPONENTS,
        count=len(bits),
        what=what,
        noise=noise,
        least=0.5 * math.log2(2 * math.pi * math.e * noise**2) if noise else None,
    )


def _with_noise(images: Tensor, objective: Likelihood, seed: int, *, step: int) -> Tensor:
    """Images as the flow is told them, but uniform in bins that a dequantiser would fill otherwise."""
    if objective.dequantisation == "variational":
        objective = replace(objective, dequantisation="uniform")
    ids = torch.arange(len(images))
    batch = Batch(images, torch.zeros_like(ids), ids)
    return objective.prepare(batch, Draw(seed, step, ids)).inputs["x"]
