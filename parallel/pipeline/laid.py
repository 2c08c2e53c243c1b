"""A model's links laid over the ranks of `pp`: what each rank holds, on the meta device and then drawn."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from flows.initialise import rules_of
from parallel.activation import checkpoint_blocks
from parallel.execution import Execution
from parallel.expert import NOTHING, Scattered, expert_mesh, scatter_experts
from parallel.fsdp import shard_model
from parallel.initialise import fill_parameters
from parallel.mesh import Layout, averaging_mesh
from parallel.parallelize import share_work
from parallel.pieces import Cut, Slice
from parallel.pipeline.cut import Bounds, cut
from parallel.pipeline.part import Chainable, Part
from parallel.pipeline.runtime import Held
from parallel.pipeline.schedule import Schedule
from parallel.precision import Precision, computing, gather_policy
from parallel.tensor import Divided


@dataclass(frozen=True)
class Pipeline:
    """A model over the ranks of one pipeline, as one of them holds it.

    single: the model as one device has it, on the meta device
    parts: (direction, stage) -> what this rank computes
    parameters: single-device name -> parameter, as far as this rank holds it
    told: names of those by which conditions are computed, which are on every rank
    counted: names of those whose gradients this rank counts in the norm, so that none is counted twice
    owners: single-device name -> the rank of the pipeline that gives the parameter to others
    divided: how parameters are cut over `tp` and `ep`
    """

    single: nn.Module
    parts: dict[Held, Part]
    parameters: dict[str, nn.Parameter]
    told: tuple[str, ...]
    counted: tuple[str, ...]
    owners: dict[str, int]
    divided: Divided


def lay_pipeline(
    model: nn.Module,
    mesh: DeviceMesh,
    layout: Layout,
    schedule: Schedule,
    costs: Sequence[float],
    execution: Execution,
    *,
    device: torch.device,
    seed: int,
) -> Pipeline:
    """Cut `model`, on the meta device, by the costs of its links, and draw this rank's weights."""
    rank = mesh.get_local_rank("pp")
    described = cast(Chainable, model)
    rules, bounds = rules_of(described), cut(costs, schedule.places[0])
    stages = lay_out_stages(
        partial(deepcopy, model),
        mesh,
        layout,
        bounds,
        schedule.local(rank),
        execution,
        device,
    )
    first, *others = stages.parts.values()
    for part in stages.parts.values():
        part.model.to_empty(device=device)
    cast(Chainable, first.model).reset_buffers()
    for part in others:
        _share_buffers(part.model, first.model)
    fill_parameters(stages.held, rules, seed)
    owners, parameters = _owners(described, schedule, bounds), stages.parameters
    told = tuple(name for name in parameters if name.startswith(described.chain().tells))
    counted = tuple(name for name in parameters if owners[name] == rank)
    own = {name: cut_ for name, cut_ in stages.cuts.items() if name in parameters}
    divided = Divided(own, tuple(name for name in parameters if name in stages.partial))
    return Pipeline(model, stages.parts, parameters, told, counted, owners, divided)


@dataclass(frozen=True)
class Stages:
    """Some stages of a model.

    parts: (direction, stage) -> what is computed
    names: single-device names of the parameters of each part, in its order
    cuts: single-device name -> how a parameter is cut over `tp` or `ep`, those elsewhere included
    partial: names of parameters whose gradients are to be summed over `tp`
    """

    parts: dict[Held, Part]
    names: dict[Held, list[str]]
    cuts: dict[str, Cut]
    partial: set[str]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        # Wrapping adds prefixes to names but keeps the order of parameters.
        return {
            name: parameter
            for held, names in self.names.items()
            for name, parameter in zip(names, self.parts[held].model.parameters(), strict=True)
        }

    @property
    def held(self) -> dict[str, nn.Parameter | Slice]:
        """The parameters, as parts of whole ones."""
        return {
            name: Slice(parameter, self.cuts[name]) if name in self.cuts else parameter
            for name, parameter in self.parameters.items()
        }


def lay_out_stages(
    make: Callable[[], nn.Module],
    mesh: DeviceMesh,
    layout: Layout,
    bounds: Bounds,
    stages: Sequence[Held],
    execution: Execution,
    device: torch.device,
) -> Stages:
    """What a rank with such stages holds of a model, where that lies: on the meta device before training.

    make: gives the model, every time anew
    execution: blocks are not compiled, and stay gathered between microbatches, which all need them
    """
    context = partial(computing, execution.precision, device)
    laid = Stages({}, {}, {}, set())
    experts: dict[Held, Scattered] = {}
    axes = expert_mesh(mesh, layout) if layout.ep > 1 else None
    for held in stages:
        model = make()
        divided = share_work(model, mesh, layout)
        part = Part(model, bounds[held[1]], bounds[held[1] + 1], context)
        experts[held] = NOTHING if axes is None else scatter_experts(model, axes, layout)
        laid.parts[held] = part
        laid.cuts.update(divided.cuts | experts[held].cuts)
        laid.partial.update(divided.partial)
    first, *others = laid.parts.values()
    for part in others:
        part.share(first)
    for held, part in laid.parts.items():
        laid.names[held] = [name for name, _ in part.model.named_parameters()]
    for held, part in laid.parts.items():
        checkpoint_blocks(part.model, part.blocks, execution.recompute)
        if layout.strategy in ("fsdp", "hsdp"):
            _cut_over_data(part, experts[held], mesh, layout, execution.precision)
    return laid


def _cut_over_data(
    part: Part, experts: Scattered, mesh: DeviceMesh, layout: Layout, precision: Precision
) -> None:
    shard_model(
        part,
        part.blocks,
        averaging_mesh(mesh, layout),
        policy=gather_policy(precision),
        reshard_after_forward=False,
        offload=False,
        apart=experts.modules,
        apart_mesh=experts.mesh,
        uncut={weight for module in part.told.values() for weight in module.parameters()},
    )
    experts.finish()


def _share_buffers(model: nn.Module, other: nn.Module) -> None:
    """Let `model` have the buffers of another that differs in parameters and wrappers of blocks alone."""
    kept = [[m for m in one.modules() if m._buffers] for one in (model, other)]
    for own, its in zip(*kept, strict=True):
        own._buffers.update(its._buffers)


def _owners(model: Chainable, schedule: Schedule, bounds: Bounds) -> dict[str, int]:
    """Single-device name -> the rank of the downward replica; the first for what is on all."""
    links = model.chain().links
    stages = range(schedule.stages)
    owners = {}
    for name, _ in model.named_parameters():
        owners[name] = 0
        for stage in stages:
            held = links[bounds[stage] : bounds[stage + 1]]
            if name.startswith(tuple(prefix for link in held for prefix in link.holds)):
                owners[name] = schedule.places[0][stage]
    return owners
