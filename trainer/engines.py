"""From a recipe to the engine that moves its model, and what each engine asks of a recipe."""

import importlib.util
import math
from dataclasses import dataclass
from typing import cast

import torch

from flows.errors import UserError
from flows.models.family import Architecture
from flows.models.routers import trace_flow
from parallel.clock import Clock
from parallel.engines import accelerate, deepspeed, deepspeed_config, native
from parallel.engines.deepspeed_config import Json, Stage
from parallel.engines.engine import Engine, OptimizerFactory, Start
from parallel.execution import Execution
from parallel.mesh import Layout, build_mesh, resolve_layout
from parallel.parallelize import FlowModel
from parallel.precision import check_float8, multiply_in_float8
from parallel.processes import Ranks, choose_device
from trainer.optimizers import build as build_adamw
from trainer.pipelines import chain_costs, schedule_of
from trainer.recipe import Recipe
from trainer.run_sections import ParallelSection


@dataclass(frozen=True)
class Placement:
    """Where everything lies.

    deepspeed: what DeepSpeed is given; None where another engine moves the model
    """

    layout: Layout
    deepspeed: Json | None

    @property
    def kind(self) -> accelerate.Kind:
        """In the words of Accelerate."""
        if self.deepspeed is not None:
            return "deepspeed"
        return cast(accelerate.Kind, self.layout.strategy)

    def state_bytes(self, parameters: int, averages: int, accumulates: bool) -> float:
        """Weights, gradients, two moments and `averages` that a rank holds.

        parameters: of the model, or of this rank's shares of its matrix products
        accumulates: see `accumulates`
        """
        if self.deepspeed is None:
            cut = self.layout.shard * (1 if self.layout.strategy == "ddp" else self.layout.cp)
            gradients = 1.0 if accumulates else 1 / cut
            return 4 * parameters * ((3 + averages) / cut + gradients)
        stage, ranks = self.deepspeed["zero_optimization"]["stage"], self.layout.world_size
        if stage == 0:
            return 4 * parameters * (4 + averages)
        wide = 2 if self.deepspeed["bf16"]["enabled"] else 4
        weights = wide / (ranks if stage == 3 else 1)
        gradients = (wide if stage == 1 else 4) / (1 if stage == 1 else ranks)
        return parameters * (weights + gradients + 4 * (3 + averages) / ranks)


def _check_float8(layout: Layout) -> None:
    """Raises UserError where products of the layout cannot be in float8."""
    for axis in ("tp", "pp"):
        if (size := getattr(layout, axis)) > 1:
            raise UserError(
                f"train.float8 = true and parallel.{axis} = {size} do not go together; use "
                f"parallel.{axis}=1, or train.float8=false."
            )
    check_float8(choose_device("auto", 0))


def accumulates(recipe: Recipe, layout: Layout) -> bool:
    """Whether FSDP adds up the gradients of several microbatches, which are whole until the last one's."""
    local = recipe.train.batch // layout.data_size
    several = (recipe.train.microbatch or local) < local
    return several and layout.strategy in ("fsdp", "hsdp")


def place(recipe: Recipe, world_size: int) -> Placement:
    """The layout of `recipe` on `world_size` ranks; needs no process group.

    Raises UserError naming the key, and what would work.
    """
    section = recipe.parallel
    if recipe.train.float8 and section.engine != "native":
        raise UserError(
            f"train.float8 = true and parallel.engine = {section.engine} do not go together; use "
            "parallel.engine=native, or train.float8=false."
        )
    if section.engine == "accelerate":
        return _place_accelerate(recipe, world_size)
    if accelerate.launched(world_size) is not None:
        raise UserError(
            f"`accelerate launch` started this, and parallel.engine = {section.engine} would pass over its "
            "config; set parallel.engine=accelerate, or start with --ranks or torchrun."
        )
    if section.engine == "deepspeed":
        return _place_deepspeed(recipe, world_size)
    layout = native_layout(section, world_size)
    if recipe.train.float8:
        _check_float8(layout)
    return Placement(layout, None)


def native_layout(section: ParallelSection, world_size: int) -> Layout:
    """That of the native engine, whatever machine this is. Raises UserError as `place` does."""
    layout = resolve_layout(
        section.strategy,
        section.replicate,
        section.shard,
        world_size,
        tp=section.tp,
        cp=section.cp,
        context=section.context,
        sequence=section.sequence,
        ep=section.ep,
        pp=section.pp,
    )
    if section.offload and layout.strategy not in ("fsdp", "hsdp"):
        raise UserError(
            f"parallel.offload keeps FSDP's shards on the host, and parallel.strategy = {layout.strategy} "
            "has none; use fsdp or hsdp (on one rank too), or drop it."
        )
    return layout


def fewest_ranks(section: ParallelSection) -> int:
    """On which a layout can be whose experts are divided over `ep` of the shard x cp ranks of a copy."""
    shard = section.shard or section.ep // math.gcd(section.ep, section.cp)
    copies = section.replicate or 1
    if section.strategy == "hsdp":  # several copies, each over several ranks
        copies = section.replicate or 2
        shard = section.shard or (2 if shard * section.cp == 1 else shard)
    return section.pp * copies * shard * section.cp * section.tp


def build_engine(
    recipe: Recipe, placement: Placement, model: Architecture, ranks: Ranks, clock: Clock
) -> Engine:
    """The engine that was asked for, its weights drawn; a collective."""
    with torch.device("meta"):
        network = model.build()
    train = recipe.train
    if train.trace_experts:
        trace_flow(network)
    if train.float8:
        multiply_in_float8(cast(FlowModel, network).blocks)
    execution = execution_of(recipe)
    start = Start(ranks.device, recipe.seed, optimizer_factory(recipe), clock)
    if recipe.parallel.engine == "accelerate":
        return accelerate.build(network, placement.kind, placement.deepspeed, execution, start)
    if placement.deepspeed is not None:
        return deepspeed.build(network, placement.deepspeed, execution, start)
    layout, mesh = placement.layout, build_mesh(placement.layout, ranks.device)
    if layout.pp > 1:
        # See parallel/pipeline/torch_schedules.py: what it imports takes long.
        from parallel.engines import pipelined

        schedule, costs = schedule_of(recipe, layout), chain_costs(recipe, model, None)[1]
        return pipelined.build(network, layout, mesh, schedule, costs, execution, start)
    return native.build(network, layout, mesh, execution, start)


def execution_of(recipe: Recipe) -> Execution:
    """How the recipe's steps are computed."""
    train, section = recipe.train, recipe.parallel
    return Execution(
        precision=train.precision,
        recompute=train.recompute,
        compile=train.compile,
        reshard_after_forward=section.reshard_after_forward,
        offload=section.offload,
    )


def optimizer_factory(recipe: Recipe) -> OptimizerFactory:
    """Makes the recipe's optimizer of names and parameters."""
    section = recipe.optimizer
    return lambda named: build_adamw(
        dict(named),
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )


def _place_deepspeed(recipe: Recipe, world_size: int) -> Placement:
    _need("deepspeed")
    section = recipe.parallel.deepspeed
    user, where = deepspeed_config.read(section.config), f"{section.config}"
    stage = deepspeed_config.stage_of(section.stage, user, where)
    return _place_zero(recipe, world_size, stage, user, where)


def _place_accelerate(recipe: Recipe, world_size: int) -> Placement:
    _need("accelerate")
    section = recipe.parallel
    accelerate.check(recipe.train.precision, world_size)
    launched, asked = accelerate.launched(world_size), section.strategy
    if launched is not None and asked not in (None, launched):
        raise UserError(
            f"{accelerate.CONFIG} asks for {launched}, and parallel.strategy = {asked}; leave it null."
        )
    if launched == "deepspeed":
        _need("deepspeed")
        user = accelerate.deepspeed_settings()
        stage = deepspeed_config.stage_of(None, user, accelerate.CONFIG)
        return _place_zero(recipe, world_size, stage, user, accelerate.CONFIG)
    if asked == "hsdp":
        raise UserError(
            "parallel.strategy = hsdp is not supported with parallel.engine = accelerate; use fsdp or ddp, "
            "or parallel.engine=native."
        )
    return Placement(resolve_layout(launched or asked, None, None, world_size), None)


def _place_zero(recipe: Recipe, world_size: int, stage: Stage, user: Json, where: str) -> Placement:
    """ZeRO of a stage, with a user's JSON from `where`."""
    train, section = recipe.train, recipe.parallel.deepspeed
    if train.compile and stage == 3:
        raise UserError(
            "train.compile = true does not go together with ZeRO stage 3, which gathers weights between "
            "the operations that would be compiled as one; use stage 2, or train.compile=false."
        )
    local = max(train.batch // world_size, 1)
    microbatch = min(train.microbatch or local, local)
    config = deepspeed_config.generate(
        user,
        where,
        stage=stage,
        precision=train.precision,
        batch=train.batch,
        microbatch=microbatch,
        accumulate=-(-local // microbatch),
        max_norm=recipe.optimizer.clip,
        offload_optimizer=deepspeed_config.offloaded(
            "offload_optimizer", section.offload_optimizer, user, where
        ),
        offload_parameters=deepspeed_config.offloaded(
            "offload_parameters", section.offload_parameters, user, where
        ),
    )
    cut = world_size if stage == 3 else 1
    layout = Layout(f"zero-{stage}", pp=1, replicate=world_size // cut, shard=cut, cp=1, tp=1)
    return Placement(layout, config)


def _need(package: str) -> None:
    """Raises UserError if an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"parallel.engine asks for the package {package}, which is not installed; run "
            f"pip install 'flowmill[{package}]'."
        )
