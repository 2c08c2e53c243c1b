"""Samples from a model, shared out over the ranks that hold it, or by one process from a checkpoint."""

from dataclasses import replace

import torch
from torch import Tensor

from flows.errors import UserError
from flows.models.family import persistent_buffers
from parallel.engines.engine import Engine
from parallel.processes import choose_device
from trainer.assembly import model_architecture
from trainer.checkpoints.store import latest_whole, load
from trainer.drawing import Samples, calls_parts, draw_samples
from trainer.ema import Ema
from trainer.recipe import Recipe, override_recipe
from trainer.run_folder import RunFolder


def balanced_labels(count: int, classes: int) -> Tensor:
    """(count,) 0, 1, ..., classes - 1, 0, 1, ...: every class as often as any other."""
    return torch.arange(count) % classes


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
    buffers = {f"buffer.{name}": value for name, value in persistent_buffers(model).items()}
    load(newest, buffers, prefix="buffer.")
    labels = balanced_labels(count, recipe.data.classes)
    with torch.no_grad():
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
