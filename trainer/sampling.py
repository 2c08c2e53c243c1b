"""Samples of a model that is being trained, shared out over the ranks that hold it."""

import torch
from torch import Tensor, nn

from flows.errors import UserError
from parallel.engines.engine import Engine
from trainer.drawing import Samples, calls_parts, draw_samples, find_shared
from trainer.ema import Ema
from trainer.recipe import Recipe, override_recipe

# What a trained model leaves open.
FREE = ("sample.", "seed=", "data.heldout=", "data.autoencoder=", "data.text.encoder=")
BATCH = 128  # samples in one network call while training: bounds memory, changes no sample


def sample_over_ranks(engine: Engine, ema: Ema, recipe: Recipe) -> Samples:
    """A grid of the averaged weights while training, the same on every rank: a collective.

    Each rank draws an equal share, since a sharded model needs them all in every call.
    """
    count = recipe.sample.count
    share = -(-count // engine.data_size)
    mine = torch.arange(engine.data_rank * share, (engine.data_rank + 1) * share)
    own = mine.remainder(count)

    def draw(model: nn.Module) -> Samples:
        shared = find_shared(model, recipe, engine.device, batch=min(BATCH, share))
        return draw_samples(
            model, recipe, own, engine.device, batch=BATCH, as_images=True, shared=shared
        )

    with ema.applied(engine.parameters(), recipe.train.ema[0]):
        drawn = engine.run(draw, whole=calls_parts(recipe))

    def together(values: Tensor) -> Tensor:
        every = values.new_zeros(share * engine.data_size, *values.shape[1:], device=engine.device)
        every[mine] = values.to(engine.device)
        return engine.sum_over_data(every)[:count].cpu()

    return Samples(together(drawn.images), together(drawn.labels), together(drawn.network_calls))


def with_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`recipe` with another seed, held-out shards, place of its encoders or `sample.*` values.

    The rest belongs to the training.
    """
    for override in overrides:
        if not override.startswith(FREE):
            raise UserError(
                f"command line: {override!r} would change the training, which is over; change "
                "sample.*, seed, data.heldout, data.autoencoder or data.text.encoder alone."
            )
    return override_recipe(recipe, overrides)
