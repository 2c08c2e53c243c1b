"""Where the experts of a run should lie, by the trace of its routing, and the run rewritten so.

A placement is a permutation of the experts of each layer: rank r of `parallel.ep` has the r-th part of them.
All that belongs to an expert moves with it (weights, the router's row and what the router carries, moments,
averages), so the network is the same function.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flows.errors import UserError
from flows.models.choice import Routing
from flows.models.mixture import Mixture, rows_of_experts
from flows.models.routers import routers_of, routing_shape
from parallel.placement.problem import Places, Problem, contiguous, hops, imbalance
from parallel.placement.solve import Method, Placed, check_ranks, place
from trainer.assembly import check_layout, model_architecture
from trainer.checkpoints.contents import checkpoint_in, read_tensors, whole_manifest
from trainer.checkpoints.manifest import Manifest, damaged_contents
from trainer.checkpoints.store import save
from trainer.engines import fewest_ranks, native_layout
from trainer.interchange import check_new
from trainer.recipe import Recipe, override_recipe, write_recipe
from trainer.routing_trace import Trace, read_trace
from trainer.run_folder import RunFolder, locked, open_run

STARTS, SEED = 32, 0  # of the alternating assignment


@dataclass(frozen=True)
class Cost:
    """Of a placement, by a trace.

    hops: pairs of a token's successive experts that are on two ranks
    imbalance: of each layer, the load of the busiest rank over the mean
    """

    hops: int
    imbalance: list[float]

    @property
    def worst(self) -> float:
        return max(self.imbalance)


@dataclass(frozen=True)
class Placing:
    """A placement of the experts of a run, beside the one they have.

    pairs: of a token's successive experts, all there are in the trace
    """

    run: RunFolder
    recipe: Recipe
    ranks: int
    trace: Trace
    pairs: int
    before: Cost
    after: Cost
    placed: Placed


def place_run(
    folder: Path, *, ranks: int | None, method: Method, limit: float, since: int, seconds: float
) -> Placing:
    """Place the experts of the run `folder`, by its trace after step `since`.

    ranks: that experts lie on; None: the recipe's `parallel.ep`
    limit, seconds: see `parallel.placement.problem.Problem` and `parallel.placement.solve.place`

    Raises UserError for a run without experts or trace, or ranks that do not divide the experts.
    """
    run, recipe = open_run(str(folder))
    shape, routing, chosen = _asked(folder, recipe, ranks)
    chosen_each = routing.chosen if routing.chooser == "tokens" else None
    trace = read_trace(run.routing, *shape, since, chosen=chosen_each)
    flow, load = trace.flow.astype(np.float64), trace.load.astype(np.float64)
    problem = Problem(flow, load, chosen, limit)
    placed = place(problem, method=method, starts=STARTS, seed=SEED, seconds=seconds)
    before = _cost(problem, contiguous(*shape, chosen))
    after = _cost(problem, placed.places)
    return Placing(run, recipe, chosen, trace, int(trace.flow.sum()), before, after, placed)


def _asked(folder: Path, recipe: Recipe, ranks: int | None) -> tuple[tuple[int, int], Routing, int]:
    """(layers, experts), how they are routed, and how many ranks they shall lie on.

    Raises UserError for a run without experts, or ranks that do not divide them.
    """
    with torch.device("meta"):
        model = model_architecture(recipe).build()
    shape, routers = routing_shape(model), routers_of(model)
    if shape is None:
        raise UserError(
            f"{folder} is a run of the family {recipe.model.family}, which has no experts to place; choose a "
            "run of dit_moe."
        )
    if ranks is None and recipe.parallel.ep == 1:
        raise UserError(
            f"{folder} was trained with parallel.ep = 1, all experts on one rank; say how many ranks there "
            "shall be, as in --ranks 2."
        )
    chosen = recipe.parallel.ep if ranks is None else ranks
    check_ranks(shape[1], chosen)
    return shape, routers[0].routing, chosen


def check_write(folder: Path, new: Path, *, ranks: int | None, step: int | None) -> None:
    """Raises UserError where `write_placed` would, before the work of a placement is done.

    ranks: see `place_run`
    """
    run, recipe = open_run(str(folder))
    check_new(new)
    _whole(run, step)
    _recipe(recipe, _asked(folder, recipe, ranks)[2], new)


def write_placed(placing: Placing, folder: Path, step: int | None = None) -> tuple[RunFolder, int]:
    """A run folder with the checkpoint of `step` (None: the newest) of the run, its experts placed.

    Training goes on in it, on as many ranks as are returned or a multiple of them, and experts are counted
    anew: metrics and trace stay with the old run.
    Raises UserError for a folder that holds something, a checkpoint that is damaged, or a run that could
    not go on so.
    """
    run, old = check_new(folder), placing.run
    checkpoint, manifest = _whole(old, step)
    recipe, needed = _recipe(placing.recipe, placing.ranks, folder)
    order = orders(placing.placed.places)
    tensors = read_tensors(checkpoint, {name: name for name in manifest.tensors})
    shapes = {name: entry.shape for name, entry in manifest.tensors.items()}
    for name, layer in layers_of_experts(placing.recipe, shapes).items():
        tensors[name] = tensors[name][torch.from_numpy(order[layer])]
    state = _state(manifest.state, order, old, placing.ranks)
    with locked(run):
        save(run.checkpoints, step=manifest.step, tensors=tensors, state=state, keep=1)
        for path in (old.shards, old.quarantine):
            if path.exists():
                shutil.copyfile(path, run.root / path.name)
        write_recipe(recipe, run.recipe)
    return run, needed


def _whole(run: RunFolder, step: int | None) -> tuple[Path, Manifest]:
    """The checkpoint of `step` (None: the newest). Raises UserError if there is none, or it is damaged."""
    checkpoint = checkpoint_in(run.root, step)
    manifest = whole_manifest(checkpoint)
    if (damage := damaged_contents(checkpoint, manifest, manifest.files)) is not None:
        raise UserError(f"{damage}; choose another step (--step), or restore it from a copy.")
    return checkpoint, manifest


def orders(places: Places) -> Places:
    """(layers, experts) which expert comes to each place: by ranks, of one rank as they were."""
    return np.argsort(places, axis=1, kind="stable")


def layers_of_experts(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Of a checkpoint's tensors, those that have a row for each expert -> the layer of these.

    shapes: of all its tensors, by name
    Raises RuntimeError if a mixture has something by experts that the checkpoint does not have.
    """
    with torch.device("meta"):
        model = model_architecture(recipe).build()
    mixtures = {name: part for name, part in model.named_modules() if isinstance(part, Mixture)}
    found: dict[str, int] = {}
    for layer, (path, mixture) in enumerate(mixtures.items()):
        count = mixture.experts.count
        for name in rows_of_experts(mixture):
            own = f"{path}.{name}"
            # An optimizer's count of steps belongs to no expert.
            holders = [
                held
                for held, shape in shapes.items()
                if (held.endswith(f".{own}") or f".{own}." in held) and shape[:1] == (count,)
            ]
            if not holders:
                raise RuntimeError(
                    f"{own} has no row for each of {count} experts in the checkpoint"
                )
            found |= dict.fromkeys(holders, layer)
    return found


def _recipe(recipe: Recipe, ranks: int, folder: Path) -> tuple[Recipe, int]:
    """That of a run, with experts divided over as many ranks as they are placed on; the fewest for all of it.

    Degrees that do not go together with these are left to be inferred.
    Raises UserError where a training could not go on so: what `flowmill train` refuses without a look at
    machine or data, and engines that divide no experts.
    """
    section, changes = recipe.parallel, [f"run.dir={folder}", f"parallel.ep={ranks}"]
    if section.engine != "native":
        raise UserError(
            f"parallel.engine = {section.engine} divides no experts, so that a placement would change "
            "nothing in a run that is written; leave --write out, or train with parallel.engine=native."
        )
    if section.strategy in ("none", "ddp"):
        changes += ["parallel.strategy=null", "parallel.replicate=null"]
    if section.shard and section.shard * section.cp % ranks:
        changes.append("parallel.shard=null")
    made = override_recipe(recipe, changes)
    needed = fewest_ranks(made.parallel)
    try:
        check_layout(made, native_layout(made.parallel, needed), model_architecture(made))
    except UserError as error:
        raise UserError(
            f"{folder} could not go on with experts on {ranks} ranks, by flowmill train --ranks {needed} "
            f"({str(error).removesuffix('.')}); choose other --ranks, or leave --write out."
        ) from None
    return made, needed


def _cost(problem: Problem, places: Places) -> Cost:
    uneven = imbalance(problem.load, places, problem.ranks).tolist()
    return Cost(round(hops(problem.flow, places)), uneven)


def _state(state: dict[str, Any], order: Places, old: RunFolder, ranks: int) -> dict[str, Any]:
    """The checkpoint's state with the numbers of experts in their new order, and whence it comes."""
    origin = {"run": str(old.root.resolve()), "ranks": ranks, "order": order.tolist()}
    told = {**state, "placed": origin}
    telemetry = state.get("telemetry", {})
    if telemetry.get("experts") is not None:
        table = np.array(telemetry["experts"])
        moved = np.take_along_axis(table, order[:, None, :], axis=2)
        told["telemetry"] = {**telemetry, "experts": moved.tolist()}
    return told
