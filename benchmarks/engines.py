"""Engines against bare PyTorch: two ranks, the same model, the same tensors, step by step in turn.

A step is forward, backward, clipping and the optimizer; what the trainer adds to it is measured by
`flowmill bench overhead`. The bare loops are what a person would type around `fully_shard` and
`DistributedDataParallel`. All sides must end with the same weights, so none can leave work out.
"""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.overhead import LARGEST_DIFFERENCE
from flows.batch import Batch
from flows.errors import UserError
from flows.initialise import Initialisable, initialise
from flows.randomness import Draw
from parallel.clock import Clock
from parallel.fsdp import quiet
from parallel.parallelize import FlowModel
from parallel.pieces import FlatPiece, Held, whole_tensor
from parallel.processes import Ranks, start, stop
from trainer.assembly import build_objective, model_architecture, plan
from trainer.engines import build_engine, optimizer_factory, place
from trainer.recipe import Recipe, override_recipe
from trainer.running import open_loader

GOAL = 0.97  # of the bare loop's speed, for the engine that is ours
BARE = ("bare DDP", "bare FSDP2")
DDP, FSDP = BARE
# Side -> (the bare loop that lies over the ranks most like it, changes to the recipe, package).
SIDES: dict[str, tuple[str, list[str], str | None]] = {
    "flowmill ddp": (DDP, ["parallel.strategy=ddp"], None),
    "flowmill fsdp": (FSDP, ["parallel.strategy=fsdp"], None),
    "Accelerate ddp": (DDP, ["parallel.engine=accelerate", "parallel.strategy=ddp"], "accelerate"),
    "Accelerate fsdp": (
        FSDP,
        ["parallel.engine=accelerate", "parallel.strategy=fsdp"],
        "accelerate",
    ),
    **{
        f"DeepSpeed zero-{stage}": (
            FSDP if stage == 3 else DDP,
            ["parallel.engine=deepspeed", f"parallel.deepspeed.stage={stage}"],
            "deepspeed",
        )
        for stage in (1, 2, 3)
    },
}
OURS = ("flowmill ddp", "flowmill fsdp")
AGAINST = {name: against for name, (against, _, _) in SIDES.items()}
BATCHES = 16


@dataclass(frozen=True)
class Row:
    """One side.

    seconds: median of a step; None where its package is not installed
    speed: median over the rounds of the bare loop's time over this side's, 1 for as fast
    difference: of its weights from those of the first side after the warm-up (relative L2)
    """

    name: str
    against: str
    seconds: float | None
    speed: float | None
    difference: float | None


@dataclass(frozen=True)
class Engines:
    """What was measured, by rank 0."""

    rounds: int
    ranks: int
    batch: int
    parameters: int
    rows: list[Row]

    @property
    def goals(self) -> list[tuple[str, float, bool]]:
        """(side, speed, whether that is as fast as wanted) of the engine that is ours."""
        found = {row.name: row.speed for row in self.rows}
        return [(name, speed, speed >= GOAL) for name in OURS if (speed := found[name]) is not None]


@dataclass(frozen=True)
class Side:
    """One way of taking a step, and what it holds of the weights by name."""

    step: Callable[[int], None]
    weights: Callable[[], Mapping[str, Held]]


def measure(recipe: Recipe, rounds: int, warm_up: int) -> Engines:
    """Every side takes `rounds` steps after `warm_up` of each, in turn; a collective of all ranks.

    Raises UserError for a recipe whose steps the bare loops do not write out, and RuntimeError if the
    sides end with different weights.
    """
    _check_same_work(recipe)
    ranks = start("auto", recipe.parallel.timeout_seconds)
    try:
        quiet()
        batches = _batches(recipe, ranks)
        sides = {name: _bare(recipe, batches, ranks, name) for name in BARE}
        for name, (_, changes, package) in SIDES.items():
            if package is None or find_spec(package) is not None:
                sides[name] = _engine(recipe, changes, batches, ranks)
        return _race(recipe, sides, ranks, rounds, warm_up)
    finally:
        stop()


def _race(
    recipe: Recipe, sides: dict[str, Side], ranks: Ranks, rounds: int, warm_up: int
) -> Engines:
    for step in range(warm_up):
        for side in sides.values():
            side.step(step)
    weights = {name: _whole(side.weights()) for name, side in sides.items()}
    apart = {name: _difference(found, weights[DDP]) for name, found in weights.items()}
    if (worst := max(apart.values())) > LARGEST_DIFFERENCE:
        raise RuntimeError(f"the sides trained apart: weights differ by {worst:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for step in range(warm_up, warm_up + rounds):
        begin = step % len(names)  # whoever comes first in a round may find the machine colder
        for name in names[begin:] + names[:begin]:
            seconds[name].append(_timed(sides[name].step, step, ranks.device))
    rows = []
    for name, against in {**dict(zip(BARE, BARE, strict=True)), **AGAINST}.items():
        if name not in sides:
            rows.append(Row(name, against, None, None, None))
            continue
        ratios = [bare / own for bare, own in zip(seconds[against], seconds[name], strict=True)]
        median = statistics.median(seconds[name])
        rows.append(Row(name, against, median, statistics.median(ratios), apart[name]))
    parameters = sum(weight.numel() for weight in weights[DDP].values())
    return Engines(rounds, ranks.world_size, recipe.train.batch, parameters, rows)


def _check_same_work(recipe: Recipe) -> None:
    """The loops are one forward in float32 on a rank's whole share, and a clipped step."""
    train = recipe.train
    refused = {
        "train.precision": train.precision != "fp32",
        "train.microbatch": train.microbatch is not None,
        "train.checkpoint_activations": train.checkpoint_activations > 0,
        "train.compile": train.compile,
        "optimizer.clip": recipe.optimizer.clip is None,
    }
    for key, wrong in refused.items():
        if wrong:
            raise UserError(
                f"{key} makes the engines do other work than the bare loops, so that their times say "
                "nothing; measure with its default."
            )


def _batches(recipe: Recipe, ranks: Ranks) -> list[Batch]:
    made = plan(recipe, ranks.world_size)
    with open_loader(made, ranks.rank, ranks.world_size, ranks.device) as loader:
        return [next(loader).to(ranks.device) for _ in range(BATCHES)]


def _engine(recipe: Recipe, changes: list[str], batches: list[Batch], ranks: Ranks) -> Side:
    changed = override_recipe(recipe, changes)
    _forget_accelerate()
    placement = place(changed, ranks.world_size)
    clock, objective = Clock(ranks.device), build_objective(recipe)
    engine = build_engine(changed, placement, model_architecture(recipe), ranks, clock)

    def step(index: int) -> None:
        microbatches = [batches[index % len(batches)]]
        engine.forward_backward(microbatches, objective, recipe.seed, index, recipe.train.batch)
        norm = engine.clip_gradients(recipe.optimizer.clip)
        engine.step(recipe.optimizer.lr, 1.0 - torch.isfinite(norm).float())
        clock.take()

    return Side(step, engine.parameters)


def _bare(recipe: Recipe, batches: list[Batch], ranks: Ranks, kind: str) -> Side:
    """Plain PyTorch."""
    model = model_architecture(recipe).build().to(ranks.device)
    initialise(cast(Initialisable, model), recipe.seed)
    names = [name for name, _ in model.named_parameters()]
    trained: nn.Module = model
    if kind == DDP:
        trained = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for block in cast(FlowModel, model).blocks:
            reshard = recipe.parallel.reshard_after_forward
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
    named = dict(zip(names, model.parameters(), strict=True))
    optimizer = optimizer_factory(recipe)(list(named.items()))
    objective, clip = build_objective(recipe), cast(float, recipe.optimizer.clip)

    def step(index: int) -> None:
        batch = batches[index % len(batches)]
        ready = objective.prepare(batch, Draw(recipe.seed, index, batch.position))
        loss = objective.loss(trained(**ready.inputs), ready.targets).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return Side(step, lambda: named)


def _forget_accelerate() -> None:
    """Accelerate is one for a process, and here it has to be several, one after the other."""
    if find_spec("accelerate") is not None:
        state = import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.pop("ACCELERATE_USE_FSDP", None)


def _timed(step: Callable[[int], None], index: int, device: torch.device) -> float:
    dist.barrier()
    begin = time.perf_counter()
    step(index)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _whole(weights: Mapping[str, Held]) -> dict[str, Tensor]:
    """Copies of all weights, on every rank."""
    found = {}
    for name, held in weights.items():
        if isinstance(held, FlatPiece):
            line = torch.zeros(held.shape.numel(), device=held.local.device)
            line[held.start : held.start + len(held.local)] = held.local
            dist.all_reduce(line)
            found[name] = line.view(held.shape)
        else:
            found[name] = whole_tensor(held).detach().clone()
    return found


def _difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Relative L2 norm of the difference of two sets of weights."""
    ours, theirs = (torch.cat([w[n].flatten() for n in first]) for w in (first, second))
    return float((ours - theirs).norm() / theirs.norm())
