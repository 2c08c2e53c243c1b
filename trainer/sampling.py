"""Samples from a model, shared out over the ranks that hold it, or by one process from a checkpoint."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flows.errors import UserError
from flows.models.dequantised import Dequantised
from flows.models.jet import Jet
from flows.randomness import Draw
from flows.samplers.guidance import Condition, null_condition
from flows.samplers.sampler import Sampled, sample
from parallel.engines.engine import Engine
from parallel.processes import choose_device
from trainer.assembly import build_flow_matching, model_architecture
from trainer.checkpoints.store import latest_whole, load
from trainer.ema import Ema
from trainer.latents import to_images
from trainer.recipe import Recipe, SampleSection, override_recipe
from trainer.run_folder import RunFolder

BATCH = 128  # samples in one network call: bounds memory, changes no sample


@dataclass(frozen=True)
class Samples:
    """What was drawn, on the CPU.

    images: (n, channels, height, width) float32, about [-1, 1]
    labels: (n,) the class each was asked for
    network_calls: (n,) int64 evaluations of the network for each; a guided step costs two
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


def balanced_labels(count: int, classes: int) -> Tensor:
    """(count,) 0, 1, ..., classes - 1, 0, 1, ...: every class as often as any other."""
    return torch.arange(count) % classes


def draw_samples(
    model: nn.Module,
    recipe: Recipe,
    labels: Tensor,
    ids: Tensor,
    device: torch.device,
) -> Samples:
    """One sample for each label; number `ids[i]` starts from the noise of that id in any batch."""
    draw = _integrate if isinstance(recipe.sample, SampleSection) else _invert
    images, calls = [], []
    for part in torch.arange(len(labels)).split(BATCH):
        drawn = draw(model, recipe, labels[part].to(device), ids[part].to(device))
        images.append(to_images(recipe, drawn.sample, device))
        calls.append(drawn.network_calls)
    return Samples(torch.cat(images), labels.cpu(), torch.cat(calls).cpu())


def _integrate(model: nn.Module, recipe: Recipe, label: Tensor, ids: Tensor) -> Sampled:
    """Samples of a velocity model: the solution of its differential equation."""
    objective, section, data = build_flow_matching(recipe), recipe.sample, recipe.data

    def velocity(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return objective.velocity(model(x=x, t=t, **condition).float(), x, t)

    condition = {"label": label}
    return sample(
        velocity,
        condition,
        null_condition(condition, objective.null_label),
        ids,
        shape=(data.channels, data.image_size, data.image_size),
        seed=recipe.seed,
        path=objective.path,
        prediction=objective.prediction,
        **section.model_dump(exclude={"every", "count"}),
    )


def _invert(model: nn.Module, recipe: Recipe, label: Tensor, ids: Tensor) -> Sampled:
    """Samples of a normalizing flow: noise, carried back to data."""
    if isinstance(model, Dequantised):
        model = model.flow
    config = model_architecture(recipe).config
    z = Draw(recipe.seed, 0, ids).normal("sample_noise", (config.tokens, config.features))
    if isinstance(model, Jet):
        return Sampled(model.inverse(z, label), 1)
    raise TypeError(f"no way to invert a {type(model).__name__}")


def calls_parts(recipe: Recipe) -> bool:
    """Whether sampling calls parts of the network, or the whole of it differently often on each rank."""
    section = recipe.sample
    return not isinstance(section, SampleSection) or section.solver == "dopri5"


def sample_over_ranks(engine: Engine, ema: Ema, recipe: Recipe) -> Samples:
    """A grid of the averaged weights while training, the same on every rank: a collective.

    Each rank draws an equal share, since a sharded model needs them all in every call.
    """
    count = recipe.sample.count
    labels = balanced_labels(count, recipe.data.classes)
    share = -(-count // engine.data_size)
    mine = torch.arange(engine.data_rank * share, (engine.data_rank + 1) * share)
    own = mine.remainder(count)
    with ema.applied(engine.parameters(), recipe.train.ema[0]):
        drawn = engine.run(
            lambda model: draw_samples(model, recipe, labels[own], own, engine.device),
            whole=calls_parts(recipe),
        )

    def together(values: Tensor) -> Tensor:
        every = values.new_zeros(share * engine.data_size, *values.shape[1:], device=engine.device)
        every[mine] = values.to(engine.device)
        return engine.sum_over_data(every)[:count].cpu()

    return Samples(together(drawn.images), labels, together(drawn.network_calls))


def sample_checkpoint(run: RunFolder, recipe: Recipe, count: int) -> Samples:
    """`count` samples, classes in turn, from the averaged weights of the newest whole checkpoint."""
    device = choose_device("auto", 0)
    newest = latest_whole(run.checkpoints)
    if newest is None:
        raise UserError(f"{run.root} has no whole checkpoint yet; train it first.")
    model = model_architecture(recipe).build().to(device).eval()
    prefix = f"ema.{recipe.train.ema[0]}." if recipe.train.ema else "model."
    weights = {f"{prefix}{name}": weight.data for name, weight in model.named_parameters()}
    state = load(newest, weights, prefix=prefix)
    labels = balanced_labels(count, recipe.data.classes)
    with torch.inference_mode():
        drawn = draw_samples(model, recipe, labels, torch.arange(count), device)
    return replace(drawn, step=int(state["step"]))


def with_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`recipe` with another seed, held-out shards, place of its autoencoder or `sample.*` values.

    The rest belongs to the training.
    """
    for override in overrides:
        if not override.startswith(("sample.", "seed=", "data.heldout=", "data.autoencoder=")):
            raise UserError(
                f"command line: {override!r} would change the training, which is over; change "
                "sample.*, seed, data.heldout or data.autoencoder alone."
            )
    return override_recipe(recipe, overrides)
