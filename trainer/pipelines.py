"""What a recipe says of a pipeline: the order of its work, and where the model is cut."""

from typing import cast

import torch
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Initialisable, initialise
from flows.models.chain import Chain, Chained
from flows.models.family import Architecture
from flows.models.routers import drop_nothing
from parallel.mesh import Layout
from parallel.pipeline.catalog import BIDIRECTIONAL, Words, make_schedule, places_of
from parallel.pipeline.costs import operations, seconds
from parallel.pipeline.cut import cut
from parallel.pipeline.schedule import Schedule
from trainer.recipe import Recipe

REPEATS = 5
WORDS = Words(
    "parallel.schedule",
    "parallel.pp",
    "train.batch / train.microbatch (a rank's)",
    "parallel.chunks",
)


def chain_of(model: nn.Module, family: str) -> Chain:
    """The links of a model. Raises UserError for a family that cannot be cut into stages."""
    if not hasattr(model, "chain"):
        raise UserError(
            f"model.family = {family} is not cut into stages; use parallel.pp=1, or the family dit, "
            "dit_moe, mmdit, starflow or tarflow."
        )
    return cast(Chained, model).chain()


def chain_costs(
    recipe: Recipe, architecture: Architecture, batch: int | None
) -> tuple[Chain, list[float]]:
    """Matrix products of every link for one sample, or seconds of forward and backward of `batch` samples."""
    device = torch.device("meta" if batch is None else "cpu")
    with device:
        model = architecture.build()
    if batch is None:
        drop_nothing(model)
    chain = chain_of(model, recipe.model.family)
    if batch is None:
        return chain, operations(chain, _inputs(recipe, 1, device))
    initialise(cast(Initialisable, model), recipe.seed)
    return chain, seconds(chain, _inputs(recipe, batch, device), REPEATS)


def microbatches(recipe: Recipe, layout: Layout) -> int:
    """Of a rank's samples of one step. Raises UserError if they are not all of one size."""
    local = recipe.train.batch // layout.data_size
    size = min(recipe.train.microbatch or local, local)
    if local % size:
        fits = ", ".join(str(n) for n in range(1, local + 1) if local % n == 0)
        raise UserError(
            f"train.microbatch = {size} does not divide the {local} samples of a rank, and a pipeline's "
            f"microbatches are all of one size; use {fits}."
        )
    return local // size


def schedule_of(recipe: Recipe, layout: Layout) -> Schedule:
    """The order of a step. Raises UserError for what it cannot do."""
    section = recipe.parallel
    number = microbatches(recipe, layout)
    return make_schedule(section.schedule, layout.pp, number, section.chunks, WORDS)


def copies(recipe: Recipe) -> int:
    """How often one pipeline holds the model."""
    two = recipe.parallel.pp > 1 and recipe.parallel.schedule in BIDIRECTIONAL
    return 2 if two else 1


def check_pipeline(recipe: Recipe, layout: Layout, architecture: Architecture) -> None:
    """Raises UserError unless the model can be cut over the ranks of `pp`, as the schedule asks."""
    for key, given in (
        ("train.compile", recipe.train.compile),
        ("parallel.offload", recipe.parallel.offload),
    ):
        if given:
            raise UserError(
                f"{key} = true does not go together with parallel.pp; drop one of them."
            )
    section, number = recipe.parallel, microbatches(recipe, layout)
    # Not the order, which may take long to find: what has too few places to cut at is refused at once.
    places = places_of(section.schedule, layout.pp, number, section.chunks, WORDS)
    cut(chain_costs(recipe, architecture, None)[1], places)


def _inputs(recipe: Recipe, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of the network's forward, all zeros."""
    data = recipe.data
    size = (batch, data.channels, data.image_size, data.image_size)
    inputs = {
        "x": torch.zeros(size, device=device),
        "t": torch.zeros(batch, device=device),
        "label": torch.zeros(batch, dtype=torch.int64, device=device),
    }
    if data.text:
        inputs["text"] = torch.zeros(batch, data.text.tokens, data.text.width, device=device)
    return inputs
