"""What a pipeline asks of a recipe's model: its chain, and what the links of it cost."""

from typing import cast

import torch
from torch import Tensor, nn

from flows.batch import Batch
from flows.errors import UserError
from flows.initialise import Initialisable, initialise
from flows.models.chain import Chain, Chained
from flows.randomness import Draw
from parallel.pipeline.costs import operations, seconds
from trainer.assembly import build_objective, model_architecture
from trainer.recipe import Recipe

REPEATS = 5


def chain_of_model(model: nn.Module, recipe: Recipe) -> Chain:
    """The links of a recipe's model. Raises UserError for a family that cannot be cut into stages."""
    if not hasattr(model, "chain"):
        raise UserError(
            f"model.family = {recipe.model.family} is not cut into stages; use parallel.pp=1, or the family "
            "dit, starflow or tarflow."
        )
    return cast(Chained, model).chain()


def chain_costs(recipe: Recipe, batch: int | None) -> tuple[Chain, list[float]]:
    """Matrix products of every link for one sample, or seconds of forward and backward of `batch` samples."""
    device = torch.device("meta" if batch is None else "cpu")
    with device:
        model = model_architecture(recipe).build()
    chain = chain_of_model(model, recipe)
    if batch is None:
        inputs = {name: value.to(device) for name, value in _inputs(recipe, 1).items()}
        return chain, operations(chain, inputs)
    initialise(cast(Initialisable, model), recipe.seed)
    return chain, seconds(chain, _inputs(recipe, batch), REPEATS)


def _inputs(recipe: Recipe, batch: int) -> dict[str, Tensor]:
    """What the objective makes of grey images for the network."""
    data = recipe.data
    image = torch.zeros(batch, data.channels, data.image_size, data.image_size)
    extras = {}
    if data.text:
        extras["text"] = torch.zeros(batch, data.text.tokens, data.text.width)
    position = torch.arange(batch)
    samples = Batch(image, torch.zeros(batch, dtype=torch.int64), position, extras)
    return build_objective(recipe).prepare(samples, Draw(recipe.seed, 0, position)).inputs
