"""From a recipe to the parts of a run. Everything that can be wrong is refused here, before any rank."""

from dataclasses import dataclass

import torch

from data_pipeline.stream import Stream, open_stream
from flows.errors import UserError
from flows.models.dit import DiT, DiTConfig
from flows.models.zoo import dit_config
from flows.objectives.flow_matching import FlowMatching
from flows.paths import path_named
from flows.times import TimeDistribution
from parallel.mesh import Layout, resolve_layout
from trainer.latents import check_latents
from trainer.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """A recipe that passed every check at a given number of ranks."""

    recipe: Recipe
    layout: Layout
    model: DiTConfig
    stream: Stream

    @property
    def local_batch(self) -> int:
        return self.recipe.train.batch // self.layout.data_size


def plan(recipe: Recipe, world_size: int) -> Plan:
    """Check the recipe against the machine, the model and the shards; opens no process group.

    Raises UserError naming the key and the values that would work.
    """
    layout = resolve_layout(
        recipe.parallel.strategy, recipe.parallel.replicate, recipe.parallel.shard, world_size
    )
    if recipe.train.batch % layout.data_size:
        raise UserError(
            f"train.batch = {recipe.train.batch} does not divide over {layout.data_size} ranks that "
            f"read different samples; use a multiple of {layout.data_size}, or other parallel degrees."
        )
    if recipe.sample.every and recipe.sample.solver == "dopri5" and layout.shard > 1:
        raise UserError(
            "sample.solver = dopri5 takes a different number of steps on each rank, which a sharded "
            "model cannot serve while training; use heun, or sample.every=0 and `flowmill sample`."
        )
    model = model_config(recipe)
    with torch.device("meta"):
        DiT(model)
    stream = training_stream(recipe)
    check_latents(recipe, stream.contents.urls)
    return Plan(recipe, layout, model, stream)


def model_config(recipe: Recipe) -> DiTConfig:
    """The model's sizes: those of its published name, with any key of the recipe put over them."""
    section, data = recipe.model, recipe.data
    return dit_config(
        name=section.name,
        patch=section.patch,
        width=section.width,
        depth=section.depth,
        heads=section.heads,
        learn_sigma=section.learn_sigma,
        image_size=data.image_size,
        channels=data.channels,
        classes=data.classes,
    )


def training_stream(recipe: Recipe) -> Stream:
    """The endless global order of the training shards."""
    data = recipe.data
    return open_stream(
        data.train, classes=data.classes, seed=recipe.seed, lanes=data.lanes, window=data.window
    )


def build_objective(recipe: Recipe) -> FlowMatching:
    """The objective of the recipe, as the model and the samplers need it."""
    section = recipe.objective
    return FlowMatching(
        path=path_named(section.path),
        prediction=section.prediction,
        weighting=section.weighting,
        label_drop=section.label_drop,
        null_label=recipe.data.classes,
        time=TimeDistribution(**section.time.model_dump()),
    )
