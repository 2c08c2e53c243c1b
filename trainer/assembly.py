"""From a recipe to the parts of a run. Everything that can be wrong is refused here, before any rank."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data_pipeline.cache import open_cache
from data_pipeline.faults import Tolerance, read_past
from data_pipeline.stream import Stream, open_stream
from flows.bases import Base, Inpainting, SuperResolution
from flows.couplings import Coupling
from flows.dequantisation import Levels
from flows.errors import UserError
from flows.mixture import MixturePath
from flows.models.dequantised import DequantiserConfig, dequantised
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.family import Architecture, architecture
from flows.models.routers import routing_shape
from flows.models.zoo import FAMILIES
from flows.objectives.boundary import Boundary
from flows.objectives.discrete import DiscreteFlowMatching
from flows.objectives.flow_matching import FlowMatching
from flows.objectives.likelihood import Likelihood
from flows.objectives.objective import Objective
from flows.objectives.output_mask import OutputMask
from flows.paths import path_named
from flows.samplers.sampler import check_settings
from flows.times import TimeDistribution
from parallel.context import check_context
from parallel.expert import check_experts, check_routing
from parallel.mesh import Layout
from parallel.tensor import check_division
from trainer.checkpoints.store import latest_whole
from trainer.engines import Placement, place
from trainer.flow_sections import LikelihoodSection
from trainer.latents import check_latents
from trainer.pipelines import check_pipeline
from trainer.prompts import embed_prompts, text_member
from trainer.recipe import Recipe
from trainer.run_folder import RunFolder
from trainer.storage import reach_storage
from trainer.token_sections import DiscreteSection
from trainer.velocity_sections import (
    BaseSection,
    BoundarySection,
    ObjectiveSection,
    SampleSection,
    TimeSection,
)


@dataclass(frozen=True)
class Plan:
    """A recipe that passed every check at a given number of ranks."""

    recipe: Recipe  # its length in steps, whatever unit it was given in
    placement: Placement
    model: Architecture
    stream: Stream

    @property
    def layout(self) -> Layout:
        return self.placement.layout

    @property
    def degrees(self) -> str:
        """How the model lies over the ranks, in words."""
        layout, engine = self.layout, self.recipe.parallel.engine
        by = "" if engine == "native" else f"{engine} "
        degrees = f"{by}{layout.strategy}, replicate {layout.replicate} x shard {layout.shard}"
        axes = (("pp", layout.pp), ("cp", layout.cp), ("tp", layout.tp))
        cut = [(name, size) for name, size in axes if size > 1]
        way = f" ({layout.context})" if layout.cp > 1 else ""
        way += f" ({self.recipe.parallel.schedule})" if layout.pp > 1 else ""
        experts = f", experts over {layout.ep}" if layout.ep > 1 else ""
        return degrees + "".join(f" x {name} {size}" for name, size in cut) + way + experts

    @property
    def local_batch(self) -> int:
        return self.recipe.train.batch // self.layout.data_size


def plan(recipe: Recipe, world_size: int) -> Plan:
    """Check the recipe against the machine, the model and the shards; opens no process group.

    Raises UserError naming the key and the values that would work.
    """
    placement = place(recipe, world_size)
    layout = placement.layout
    if isinstance(recipe.sample, SampleSection):
        section = recipe.sample
        check_settings(
            section.solver,
            section.times,
            section.guidance_channels,
            section.guidance_cosine,
            channels=recipe.data.channels,
        )
    model = model_architecture(recipe)
    check_layout(recipe, layout, model)
    build_objective(recipe)
    _check_extras(recipe)
    stream = training_stream(recipe)
    check_latents(recipe, stream.urls)
    if recipe.sample.prompts:
        embed_prompts(recipe, recipe.sample.prompts)
    return Plan(in_steps(recipe, stream.epochs), placement, model, stream)


def check_layout(recipe: Recipe, layout: Layout, model: Architecture) -> None:
    """Raises UserError unless the ranks can share the samples of a batch, and the work on each."""
    if recipe.train.batch % layout.data_size:
        raise UserError(
            f"train.batch = {recipe.train.batch} does not divide over {layout.data_size} ranks that "
            f"read different samples; use a multiple of {layout.data_size}, or other parallel degrees."
        )
    with torch.device("meta"):
        network = model.build()
    check_routing(network, layout)
    _check_trace(recipe, network)
    if layout.pp > 1:
        check_pipeline(recipe, layout, model)
    if layout.tp > 1:
        check_division(network, layout)
    if layout.cp > 1:
        check_context(network, layout.cp, layout.context, layout.tp)
    if layout.ep > 1:
        check_experts(network, layout.ep, family=model.family.name, compiled=recipe.train.compile)


def _check_trace(recipe: Recipe, network: nn.Module) -> None:
    every = recipe.train.trace_experts
    if not every:
        return
    shape = routing_shape(network)
    if shape is None or shape[0] < 2:
        raise UserError(
            f"train.trace_experts = {every} counts tokens on their way from layer to layer of experts, and "
            f"this model has {0 if shape is None else shape[0]} of these; set it to 0, or use "
            "model.family=dit_moe with two layers or more."
        )


def _check_extras(recipe: Recipe) -> None:
    """Raises UserError for an objective that needs beside the images what no shard brings."""
    objective = recipe.objective
    if isinstance(objective, ObjectiveSection) and objective.alignment:
        raise UserError(
            f"objective.alignment = {objective.alignment:g} needs an encoder's features beside each image, "
            "which no shards hold; set objective.alignment=0, or train it in Python, as docs/models.md says."
        )


def in_steps(recipe: Recipe, samples: list[int]) -> Recipe:
    """`recipe` with its length in optimizer steps.

    samples: how many each data set has in an epoch

    Raises UserError for epochs of several data sets.
    """
    train = recipe.train
    if train.steps:
        return recipe
    if train.epochs and len(samples) > 1:
        raise UserError(
            f"train.epochs = {train.epochs:g} has no meaning for a mixture, where each data set has "
            "epochs of its own; give train.samples or train.steps."
        )
    length = train.samples or math.ceil(train.epochs * samples[0])
    in_units = {"steps": -(-length // train.batch), "samples": 0, "epochs": 0.0}
    return recipe.model_copy(update={"train": train.model_copy(update=in_units)})


def model_architecture(recipe: Recipe) -> Architecture:
    """The model's sizes: those of its published name, with any key of the recipe put over them."""
    section, data = recipe.model, recipe.data
    sizes = {
        "image_size": data.image_size,
        "channels": data.channels,
        "classes": data.classes,
        "text_width": data.text.width if data.text else 0,
        "text_tokens": data.text.tokens if data.text else 0,
    }
    made = architecture(FAMILIES[section.family], section.name, section.own_keys(), sizes)
    objective = recipe.objective
    if isinstance(objective, LikelihoodSection) and objective.dequantisation == "variational":
        return dequantised(made, _dequantiser(recipe, objective))
    return made


def _dequantiser(recipe: Recipe, section: LikelihoodSection) -> DequantiserConfig:
    return DequantiserConfig(
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        levels=Levels(section.levels, section.bins),
        **section.dequantiser.model_dump(),
    )


def training_stream(recipe: Recipe) -> Stream:
    """The endless global order of the training shards; of those a run began with, when it goes on."""
    data, run = recipe.data, RunFolder(Path(recipe.run.dir))
    begun = latest_whole(run.checkpoints) is not None
    past = read_past(run.shards) if begun else None
    reach_storage(recipe)
    open_cache()  # refused here, before ranks start, if it cannot be
    return open_stream(
        data.sources,
        keep=data.keep,
        classes=data.classes,
        seed=recipe.seed,
        lanes=data.lanes,
        window=data.window,
        text=text_member(data.text) if data.text else None,
        tolerate=Tolerance(data.max_bad_fraction, run.quarantine, past),
    )


def build_objective(recipe: Recipe) -> Objective:
    """The objective of the recipe."""
    if isinstance(recipe.objective, LikelihoodSection):
        return build_likelihood(recipe, recipe.objective)
    if isinstance(recipe.objective, DiscreteSection):
        return build_discrete(recipe)
    return build_flow_matching(recipe)


def build_flow_matching(recipe: Recipe) -> FlowMatching:
    """The objective of a velocity model, as its samplers need it, too."""
    section = recipe.objective
    if not isinstance(section, ObjectiveSection):
        raise TypeError(f"a {type(section).__name__} is no flow matching")
    _check_sampling(recipe, section)
    return FlowMatching(
        path=path_named(section.path, sigma_min=section.sigma_min, exponent=section.exponent),
        prediction=section.prediction,
        weighting=section.weighting,
        label_drop=section.label_drop,
        null_label=recipe.data.classes,
        time=_times(section.time, recipe.train.batch),
        shape=section.loss,
        coupling=_coupling(section),
        bridge=section.bridge,
        contrast=section.contrast,
        base=_base(section.base, recipe.data.image_size),
        boundary=_boundary(section.boundary, recipe.data.channels),
        alignment=section.alignment,
        output_mask=_output_mask(recipe),
    )


def _times(section: TimeSection, batch: int) -> TimeDistribution:
    strata = batch if section.stratified else 0
    return TimeDistribution(**section.model_dump(exclude={"stratified"}), strata=strata)


def _coupling(section: ObjectiveSection) -> Coupling | None:
    """None for independent noise; an entropic plan fits a bridge where no scale is given."""
    coupling = section.coupling
    if coupling.kind == "independent":
        return None
    epsilon = coupling.epsilon or 2 * section.bridge**2
    return Coupling(coupling.kind, epsilon, coupling.group)


def _output_mask(recipe: Recipe) -> OutputMask | None:
    config = model_architecture(recipe).config
    if not isinstance(config, DiTMoEConfig) or not config.mask_outputs:
        return None
    return OutputMask(config.mask_outputs, (config.depth, config.tokens, config.slots))


def _base(section: BaseSection, image_size: int) -> Base | None:
    if section.kind == "noise":
        return None
    if section.kind == "inpainting":
        return Inpainting(section.tile, section.seen)
    if image_size % section.factor:
        raise UserError(
            f"objective.base.factor = {section.factor} does not divide data.image_size = {image_size}; "
            "use a factor that does."
        )
    return SuperResolution(section.factor, section.noise)


def _boundary(section: BoundarySection, channels: int) -> Boundary | None:
    if section.ends == "none":
        return None
    mean = section.mean if section.ends == "both" else None
    if mean is not None and len(mean) != channels:
        raise UserError(
            f"objective.boundary.mean lists {len(mean)} numbers for data.channels = {channels}; give "
            "one for each."
        )
    return Boundary(section.power, tuple(mean) if mean is not None else None)


def _check_sampling(recipe: Recipe, section: ObjectiveSection) -> None:
    """Raises UserError for samples that this objective does not teach a model to draw."""
    solver = recipe.sample.solver if isinstance(recipe.sample, SampleSection) else ""
    if solver in ("sde", "sde_heun") and not section.independent:
        raise UserError(
            f"sample.solver = {solver} takes the score from the velocity, as only independent noise "
            "allows; use another solver, or drop objective.coupling, objective.bridge and objective.base."
        )
    if recipe.sample.every and section.base.kind != "noise":
        raise UserError(
            f"objective.base.kind = {section.base.kind} trains a model to go on from an image, and "
            "sample.every would have it begin at noise; set sample.every=0."
        )


def build_likelihood(recipe: Recipe, section: LikelihoodSection) -> Likelihood:
    """The objective of a normalizing flow.

    Latents have no levels, so that nothing fills their bins: `uniform`, the default, which the recipes
    in run folders spell out, is none of them.

    Raises UserError for latents with another dequantisation.
    """
    pixels = not recipe.data.latents
    kind = section.dequantisation
    return Likelihood(
        dequantisation="none" if kind == "uniform" and not pixels else kind,
        levels=Levels(section.levels, section.bins) if pixels else None,
        noise=section.noise,
        power=section.power,
        label_drop=section.label_drop,
        null_label=recipe.data.classes,
        text_drop=section.label_drop if recipe.data.text else None,
    )


def build_discrete(recipe: Recipe) -> DiscreteFlowMatching:
    """The objective of a model over tokens, as its samplers need it, too."""
    section = recipe.objective
    if not isinstance(section, DiscreteSection):
        raise TypeError(f"a {type(section).__name__} is no discrete flow matching")
    if recipe.data.latents:
        raise UserError(
            f"data.latents = true, and model.family = {recipe.model.family} makes tokens of the brightnesses "
            "of pixels, which latents do not have; train on images, or choose another model.family."
        )
    levels = model_architecture(recipe).config.levels
    return DiscreteFlowMatching(
        path=MixturePath(levels, section.source, section.exponent),
        loss_kind=section.loss,
        label_drop=section.label_drop,
        null_label=recipe.data.classes,
        time=_times(section.time, recipe.train.batch),
    )
