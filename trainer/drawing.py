"""From a model to samples of it, by whatever its family and the recipe ask for."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from flows.errors import UserError
from flows.mixture import to_image
from flows.models.dequantised import Dequantised
from flows.models.jet import Jet
from flows.models.tarflow import TarFlow
from flows.objectives.flow_matching import FlowMatching
from flows.randomness import Draw
from flows.samplers.denoise import denoise_by_score
from flows.samplers.discrete import sample_tokens
from flows.samplers.guidance import Condition, Velocity, null_condition
from flows.samplers.inversion import SEQUENTIAL, AutoregressiveFlow, Strategy, invert, prior
from flows.samplers.inversion_guidance import FlowGuidance
from flows.samplers.inversion_search import choose_strategy
from flows.samplers.sampler import Sampled, sample
from parallel.processes import from_first
from trainer.asked import ask
from trainer.assembly import build_discrete, build_flow_matching
from trainer.flow_sections import InversionSection, LikelihoodSection
from trainer.latents import to_images
from trainer.prior import measured_variance
from trainer.recipe import Recipe
from trainer.token_sections import JumpSection
from trainer.velocity_sections import SampleSection

EVERY_TOKEN = 2**31  # a group that no chain is longer than

Draws = Callable[[Condition, Tensor], Sampled]


@dataclass(frozen=True)
class Samples:
    """What was drawn, on the CPU.

    images: (n, channels, height, width) float32, about [-1, 1]
    labels: (n,) the class each was asked for
    network_calls: (n,) evaluations of the network for each; a guided step costs two
    step: of the checkpoint they are from; None while training
    """

    images: Tensor
    labels: Tensor
    network_calls: Tensor
    step: int | None = None

    @property
    def mean_calls(self) -> float:
        """What a sample costs: they differ where each takes as many steps as it needs."""
        return self.network_calls.double().mean().item()


def broken_rows(images: Tensor) -> list[int]:
    """Which of (n, ...) samples have a number that is not finite."""
    broken: list[int] = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    return broken


@dataclass(frozen=True)
class Shared:
    """What all batches of samples have in common, found once and alike on every rank.

    variance: of the prior of a flow that preserves volume, on the CPU; None for other models
    strategies: how an autoregressive flow is inverted
    """

    variance: Tensor | None = None
    strategies: Strategy | list[Strategy] = SEQUENTIAL

    def variance_on(self, device: torch.device) -> Tensor | None:
        return None if self.variance is None else self.variance.to(device)


def find_shared(model: nn.Module, recipe: Recipe, device: torch.device, *, batch: int) -> Shared:
    """What samples that are drawn `batch` at a time share; a collective where ranks have joined.

    The first rank finds it: what is fastest there need not be so everywhere.
    """
    flow, section = _flow(model), recipe.sample
    if not isinstance(section, InversionSection) or isinstance(flow, Jet):
        return Shared()
    return from_first(lambda: _shared(model, recipe, section, device, batch))


def draw_samples(
    model: nn.Module,
    recipe: Recipe,
    ids: Tensor,
    device: torch.device,
    *,
    batch: int,
    as_images: bool,
    shared: Shared,
) -> Samples:
    """Samples of (n,) `ids`, each a function of its id in any batch; see `trainer.asked` for what of.

    batch: samples in one network call
    as_images: of latents, what their autoencoder makes of them; else the latents
    """
    asked, images, calls = ask(recipe, ids), [], []
    draw = _way(model, recipe, shared)
    for part in torch.arange(len(ids)).split(batch):
        drawn = draw(asked.take(part).condition(device), ids[part].to(device))
        made = drawn.sample
        images.append(to_images(recipe, made, device) if as_images else made.cpu())
        calls.append(drawn.network_calls)
    return Samples(torch.cat(images), asked.labels, torch.cat(calls).cpu())


def _way(model: nn.Module, recipe: Recipe, shared: Shared) -> Draws:
    """How the recipe's samples are drawn: a function of what they are asked to be and their ids."""
    if isinstance(recipe.sample, InversionSection):
        return partial(_invert, _flow(model), recipe, recipe.sample, shared)
    return partial(_jump if isinstance(recipe.sample, JumpSection) else _integrate, model, recipe)


def _integrate(model: nn.Module, recipe: Recipe, condition: Condition, ids: Tensor) -> Sampled:
    """Samples of a velocity model: the solution of its differential equation."""
    objective, section, data = build_flow_matching(recipe), recipe.sample, recipe.data
    return sample(
        velocity_of(model, objective),
        condition,
        null_condition(condition, objective.null_label),
        ids,
        shape=(data.channels, data.image_size, data.image_size),
        seed=recipe.seed,
        path=objective.path,
        prediction=objective.prediction,
        **section.own_keys(),
    )


def velocity_of(model: nn.Module, objective: FlowMatching) -> Velocity:
    """The velocity that a model's prediction implies, as samplers call it.

    Raises UserError for a model that does not begin with noise.
    """
    if objective.base:
        raise UserError(
            "This model goes on from an image (objective.base) and draws nothing from noise; give it "
            "images by flows.samplers.completion."
        )

    def velocity(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return objective.velocity(model(x=x, t=t, **condition).float(), x, t)

    return velocity


def _jump(model: nn.Module, recipe: Recipe, condition: Condition, ids: Tensor) -> Sampled:
    """Samples of a model over tokens: what its jumps have made of them at the end, as images."""
    objective, section, data = build_discrete(recipe), recipe.sample, recipe.data
    shape = (data.channels, data.image_size, data.image_size)

    def predict(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        logits: Tensor = model(x=x, t=t, **condition)
        return logits

    drawn = sample_tokens(
        predict,
        condition,
        null_condition(condition, objective.null_label),
        ids,
        path=objective.path,
        tokens=math.prod(shape),
        seed=recipe.seed,
        **section.own_keys(),
    )
    return Sampled(to_image(drawn.tokens, objective.path.levels, shape), drawn.network_calls)


def _flow(model: nn.Module) -> nn.Module:
    """What makes images: a dequantiser around a flow is there to be trained with."""
    return model.flow if isinstance(model, Dequantised) else model


def _invert(
    flow: nn.Module,
    recipe: Recipe,
    section: InversionSection,
    shared: Shared,
    condition: Condition,
    ids: Tensor,
) -> Sampled:
    """Samples of a normalizing flow: noise, carried back to data and freed of the noise of training."""
    objective = recipe.objective
    assert isinstance(objective, LikelihoodSection)
    variance = shared.variance_on(ids.device)
    if isinstance(flow, Jet):
        shape = (flow.config.tokens, flow.config.features)
        noise = Draw(recipe.seed, 0, ids).normal("sample_noise", shape)
        x, calls = flow.inverse(noise, condition["label"]), 1.0
    else:
        chains = cast(AutoregressiveFlow, flow)
        inverted = invert(
            chains,
            prior(chains, recipe.seed, ids, variance),
            **condition,
            strategy=shared.strategies,
            guidance=_guidance(section),
            tolerance=section.tolerance,
            clamp=section.clamp,
        )
        x, calls = inverted.x, inverted.network_calls
    if objective.noise and section.denoise:
        clean = denoise_by_score(
            flow,
            x,
            condition,
            noise=objective.noise,
            scale=section.denoise,
            variance=variance,
        )
        x, calls = clean.sample, calls + clean.network_calls
    return Sampled(x, torch.full((len(x),), calls, dtype=torch.float64))


def _shared(
    model: nn.Module, recipe: Recipe, section: InversionSection, device: torch.device, batch: int
) -> Shared:
    """Of an autoregressive flow, on conditions like those of the first batch."""
    flow, variance = _flow(model), None
    if isinstance(flow, TarFlow) and flow.config.volume_preserving:
        variance = measured_variance(model, recipe, device)
    held = None if variance is None else variance.cpu()
    if section.strategy != "auto":
        return Shared(held, _strategy(section))
    first = ask(recipe, torch.arange(batch)).condition(device)
    choices = choose_strategy(
        cast(AutoregressiveFlow, flow),
        batch,
        first["label"],
        first.get("text"),
        guidance=_guidance(section),
        tolerance=section.tolerance,
        accuracy=section.accuracy,
        clamp=section.clamp,
        variance=variance,
    )
    return Shared(held, [choice.strategy for choice in choices])


def _guidance(section: InversionSection) -> FlowGuidance:
    return FlowGuidance(
        weight=section.guidance,
        form=section.form,
        parts=section.parts,
        annealed=section.annealed,
        temperature=section.temperature,
    )


def _strategy(section: InversionSection) -> Strategy:
    if section.strategy in ("sequential", "auto"):
        return SEQUENTIAL
    group = EVERY_TOKEN if section.strategy == "jacobi" else section.group
    return Strategy(group, section.iterations, sliding=section.strategy == "sliding")


def calls_parts(recipe: Recipe) -> bool:
    """Whether sampling calls parts of the network, or the whole of it differently often on each rank."""
    section = recipe.sample
    own_steps = isinstance(section, SampleSection) and section.solver == "dopri5"
    return isinstance(section, InversionSection) or own_steps
