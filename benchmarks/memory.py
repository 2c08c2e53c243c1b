"""What a rank holds of a recipe's model on any number of ranks, found out without the ranks or the memory.

The model is laid over a process group that only counts ranks, on the meta device, so what a rank holds is
read from the very tensors that training would have. What a step keeps for its backward is found by a
forward of one microbatch whose tensors have shapes and no memory.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from flows.batch import Batch
from flows.errors import UserError
from flows.models.family import Architecture, parameter_count
from flows.models.routers import drop_nothing
from flows.randomness import Draw
from parallel.activation import Recompute
from parallel.fsdp import gathered_bytes
from parallel.memory import LiveBytes, held_bytes
from parallel.mesh import AXES, Layout, build_mesh
from parallel.parallelize import FlowModel, ParallelModel, lay_out
from parallel.pipeline.cut import Bounds, cut
from parallel.pipeline.laid import lay_out_stages
from parallel.pipeline.part import Part
from parallel.pipeline.schedule import FREES, Schedule, Work
from parallel.precision import computing
from trainer.assembly import build_objective, check_layout, model_architecture
from trainer.engines import accumulates, execution_of, place
from trainer.pipelines import chain_costs, schedule_of
from trainer.recipe import Recipe


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the first rank, which holds as much as any; of pipelines, of a rank that holds most.

    whole: parameters of the model, a number each
    offloaded: what lies there between steps is on the host, and no part of the total
    gradients: of the shards; of all that the rank computes with where microbatches add up
    gathered: weights of other ranks that are there while blocks compute
    activations: what the forward of a microbatch keeps for its backward
    recomputed: what one block keeps while it is computed again, the mean of the blocks that are
    messages: of pipelines, what comes of each microbatch from the ranks before and after, and goes to them
    """

    ranks: int
    layout: str
    whole: int
    offloaded: bool
    parameters: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int
    activations: int
    recomputed: int
    messages: int = 0

    @property
    def total(self) -> int:
        found = asdict(self)
        return sum(found[name] for name in (DEVICE if self.offloaded else HELD))


DEVICE = ("gathered", "activations", "recomputed", "messages")
HELD = ("parameters", "gradients", "optimizer", "averages", *DEVICE)


def measure(recipe: Recipe, ranks: int) -> RankMemory:
    """Raises UserError for a layout that cannot be, and for other engines than the native one."""
    if recipe.parallel.engine != "native":
        raise UserError(
            f"parallel.engine = {recipe.parallel.engine} lays a model out in its own way, which is not known "
            "beforehand; use parallel.engine=native."
        )
    placement = place(recipe, ranks)
    architecture, layout = model_architecture(recipe), placement.layout
    check_layout(recipe, layout, architecture)
    if layout.pp > 1:
        return max(measure_pipeline(recipe, ranks), key=lambda found: found.total)
    with pretended_ranks(ranks, 0):
        mesh = build_mesh(layout, torch.device("cpu"))
        with torch.device("meta"):
            model = architecture.build()
        whole = parameter_count(model)
        held = _laid_out(recipe, model, mesh, layout, recipe.train.recompute)
        parameters = held_bytes(held.held.values())
        gradients = parameters
        if accumulates(recipe, layout):
            gradients = 4 * sum(parameter.numel() for parameter in held.parameters.values())
        wide = 2 if recipe.train.precision == "bf16" else 4
        gathered = gathered_bytes(held.bare, wide, recipe.parallel.reshard_after_forward)
        activations, recomputed = _activations(recipe, architecture, mesh, layout)
    return RankMemory(
        ranks=ranks,
        layout=_in_words(layout),
        whole=whole,
        offloaded=recipe.parallel.offload,
        parameters=parameters,
        gradients=gradients,
        optimizer=2 * parameters,
        averages=len(recipe.train.ema) * parameters,
        gathered=gathered,
        activations=activations,
        recomputed=recomputed,
    )


def measure_pipeline(recipe: Recipe, ranks: int) -> list[RankMemory]:
    """What each rank of the first pipeline holds; blocks stay gathered, and their gradients whole."""
    layout, architecture = place(recipe, ranks).layout, model_architecture(recipe)
    schedule = schedule_of(recipe, layout)
    bounds = cut(chain_costs(recipe, architecture, None)[1], schedule.places[0])
    with torch.device("meta"):
        model = architecture.build()
    with pretended_ranks(ranks, 0):
        stages = _of_stages(recipe, architecture, layout, schedule, bounds)
    found = []
    for rank in range(layout.pp):
        with pretended_ranks(ranks, rank * (ranks // layout.pp)):
            laid = lay_out_stages(
                partial(deepcopy, model),
                build_mesh(layout, torch.device("cpu")),
                layout,
                bounds,
                schedule.local(rank),
                execution_of(recipe),
                torch.device("cpu"),
            )
        parameters = held_bytes(laid.held.values())
        whole_ones = 4 * sum(parameter.numel() for parameter in laid.parameters.values())
        found.append(
            RankMemory(
                ranks=ranks,
                layout=_in_words(layout),
                whole=parameter_count(model),
                offloaded=False,
                parameters=parameters,
                gradients=whole_ones,
                optimizer=2 * parameters,
                averages=len(recipe.train.ema) * parameters,
                gathered=sum(_gathered(recipe, part) for part in laid.parts.values()),
                activations=_most(schedule, rank, [stage.kept for stage in stages]),
                recomputed=max(stages[stage].recomputed for _, stage in schedule.local(rank)),
                messages=_messages(schedule, rank, stages),
            )
        )
    return found


class StageBytes(NamedTuple):
    """Of one microbatch.

    kept: what the forward leaves for the backward
    recomputed: what one of the blocks adds while it is computed again
    after: the gradient of what goes to the stage after
    """

    kept: int
    recomputed: int
    after: int


def _of_stages(
    recipe: Recipe,
    architecture: Architecture,
    layout: Layout,
    schedule: Schedule,
    bounds: Bounds,
) -> list[StageBytes]:
    mesh, cpu = build_mesh(layout, torch.device("cpu")), torch.device("cpu")
    whole = replace(layout, strategy="none", ep=1)
    every = recipe.train.recompute.every
    found = []
    with _without_memory():
        batch = _microbatch(recipe, recipe.train.batch // layout.data_size)
        prepared = build_objective(recipe).prepare(batch, Draw(recipe.seed, 0, batch.position))
        rest = {name: value for name, value in prepared.inputs.items() if name != "x"}
        stream: tuple[Tensor, ...] = (prepared.inputs["x"],)
        for stage in range(schedule.stages):
            kept = []
            for recompute in (recipe.train.recompute, Recompute(0)):
                laid = lay_out_stages(
                    partial(_network, architecture),
                    mesh,
                    whole,
                    bounds,
                    [(0, stage)],
                    replace(execution_of(recipe), recompute=recompute),
                    cpu,
                )
                part = laid.parts[0, stage]
                _as_gathered(recipe, layout, part)
                with LiveBytes() as live:
                    outputs = part(*stream, **rest)
                    kept.append(live.now)
            again = -(-len(part.blocks) // every) if every else 0
            several = outputs if isinstance(outputs, tuple) else (outputs,)
            stream = tuple(t.detach().requires_grad_(t.requires_grad) for t in several)
            after = sum(t.numel() * t.element_size() for t in stream if t.requires_grad)
            found.append(StageBytes(kept[0], (kept[1] - kept[0]) // max(again, 1), after))
    return found


def _most(schedule: Schedule, rank: int, kept: Sequence[int]) -> int:
    """The most bytes that forwards have left on a rank and backwards have not taken yet."""
    held = most = 0
    for action in schedule.actions[rank]:
        if action.work is Work.FORWARD:
            held += kept[action.stage]
        elif action.work in FREES:
            held -= kept[action.stage]
        most = max(most, held)
    return most


def _messages(schedule: Schedule, rank: int, stages: Sequence[StageBytes]) -> int:
    """Places for what comes in, of all microbatches of a schedule, and what was sent, until the step ends.

    What goes on between two stages, and the gradient of that, are of one size.
    """
    total, each = 0, schedule.microbatches // schedule.directions
    for direction, stage in schedule.local(rank):
        places = schedule.places[direction]
        for border in (stage - 1, stage):
            if 0 <= border < schedule.stages - 1:
                sent = each if places[border] != places[border + 1] else 0
                total += (schedule.microbatches + sent) * stages[border].after
    return total


def _gathered(recipe: Recipe, part: Part) -> int:
    """Of a part's whole weights; those by which conditions are computed are whole anyway."""
    wide = 2 if recipe.train.precision == "bf16" else 4
    told = sum(parameter_count(module) for module in part.told.values())
    gathered = gathered_bytes(part, wide, reshard_after_forward=False)
    return gathered - wide * told if gathered else 0


def _in_words(layout: Layout) -> str:
    return " x ".join(f"{axis} {n}" for axis in (*AXES, "ep") if (n := getattr(layout, axis)) > 1)


@contextmanager
def pretended_ranks(count: int, rank: int) -> Iterator[None]:
    """A process group of so many ranks of which this is one, and whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _laid_out(
    recipe: Recipe, model: nn.Module, mesh: DeviceMesh, layout: Layout, recompute: Recompute
) -> ParallelModel:
    execution = replace(execution_of(recipe), recompute=recompute, compile=False, offload=False)
    return lay_out(model, mesh, layout, execution)


def _activations(
    recipe: Recipe, architecture: Architecture, mesh: DeviceMesh, layout: Layout
) -> tuple[int, int]:
    """What all of a microbatch's forward leaves, and what one block adds while it is recomputed."""
    train = recipe.train
    kept = _kept(recipe, architecture, mesh, layout, train.recompute)
    if not train.recompute.every:
        return kept, 0
    everything = _kept(recipe, architecture, mesh, layout, Recompute(0))
    with torch.device("meta"):
        blocks = len(cast(FlowModel, architecture.build()).blocks)
    return kept, (everything - kept) // -(-blocks // train.recompute.every)


def _kept(
    recipe: Recipe,
    architecture: Architecture,
    mesh: DeviceMesh,
    layout: Layout,
    recompute: Recompute,
) -> int:
    """Bytes that a forward of one microbatch leaves, of a model whose weights are all there."""
    objective, cpu = build_objective(recipe), torch.device("cpu")
    # Where loads are balanced, as many tokens come to a rank's experts as leave for those of others.
    whole = replace(layout, strategy="none", ep=1)
    with _without_memory():
        network = _laid_out(recipe, _network(architecture), mesh, whole, recompute).bare
        _as_gathered(recipe, layout, network)
        batch = _microbatch(recipe, recipe.train.batch // layout.data_size)
        prepared = objective.prepare(batch, Draw(recipe.seed, 0, batch.position))
        with LiveBytes() as live, computing(recipe.train.precision, cpu):
            outputs = network(**prepared.inputs)
            kept: int = live.now
        del outputs
    return kept


@contextmanager
def _without_memory() -> Iterator[None]:
    """Tensors that are made within have shapes, on a CPU, and no memory."""
    with FakeTensorMode(), torch.device("cpu"), warnings.catch_warnings():
        # Copying a model whose tensors have no memory asks where their memory is.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


def _network(architecture: Architecture) -> nn.Module:
    """Every token finds a place at its experts: how many would not is not known beforehand."""
    network = architecture.build()
    drop_nothing(network)
    return network


def _as_gathered(recipe: Recipe, layout: Layout, network: nn.Module) -> None:
    """Weights as FSDP gathers them."""
    if recipe.train.precision == "bf16" and layout.strategy in ("fsdp", "hsdp"):
        for parameter in network.parameters():
            parameter.data = parameter.data.bfloat16()


def _microbatch(recipe: Recipe, local: int) -> Batch:
    data, count = recipe.data, min(recipe.train.microbatch or local, local)
    extras = {}
    if data.text is not None:
        extras["text"] = torch.zeros(count, data.text.tokens, data.text.width)
    return Batch(
        torch.zeros(count, data.channels, data.image_size, data.image_size),
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count),
        extras,
    )
