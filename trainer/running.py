"""One rank of a training, from its recipe to its last checkpoint.

The order in which a run begins or goes on is a contract:

1. The recipe is checked against machine, model, shards and run folder; nothing exists yet.
2. The ranks meet; rank 0 locks the run folder.
3. The model is laid over the mesh and drawn from the seed, the averages begin at the weights.
4. The newest whole checkpoint, if any, overwrites weights, optimizer, averages and counters in place; one
   of imported weights has weights and averages alone.
5. The loader stands at the checkpoint's position. Up to here whatever is refused leaves a run as it was.
6. Rank 0 writes the resolved recipe, drops metrics after the checkpoint's step, and calls MLflow.
7. The loop goes on at the checkpoint's step: everything random is a function of step and position.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.augment import Augment
from data_pipeline.faults import Budget, Quarantine, write_past
from data_pipeline.loader import Loader
from data_pipeline.share import Share
from flows.errors import UserError
from parallel.clock import Clock
from parallel.processes import Ranks, start, stop
from trainer import tracking
from trainer.assembly import Plan, build_objective, plan
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.store import latest_whole, load
from trainer.ema import Ema
from trainer.engines import build_engine
from trainer.latents import open_reader
from trainer.loop import ORIGINS, Parts, checkpoint_tensors, train
from trainer.recipe import Recipe, write_recipe
from trainer.reporting import Progress, Quiet, Report, open_tracker, store_address
from trainer.run_folder import RunFolder, check_length, check_resume, check_science, locked
from trainer.telemetry import Telemetry


@dataclass(frozen=True)
class Outcome:
    """How a training ended: steps done, of how many, and whether it was asked to stop."""

    steps: int
    total: int

    @property
    def finished(self) -> bool:
        return self.steps >= self.total


def run_training(recipe: Recipe, world_size: int, progress: Progress) -> Outcome:
    """Train `recipe` as one of `world_size` ranks; in a run folder with a checkpoint, go on from it.

    progress: told of every step and event, on rank 0 alone
    Raises UserError for whatever a person can set right.
    """
    made = plan(recipe, world_size)
    recipe = made.recipe
    run = RunFolder(Path(recipe.run.dir))
    changed = check_resume(run, recipe)
    ranks = start("auto", recipe.parallel.timeout_seconds)
    try:
        torch.use_deterministic_algorithms(recipe.train.deterministic)
        with ExitStack() as stack:
            return train_rank(made, run, ranks, progress, changed, stack)
    finally:
        stop()


def train_rank(
    made: Plan,
    run: RunFolder,
    ranks: Ranks,
    progress: Progress,
    changed: list[str],
    stack: ExitStack,
) -> Outcome:
    """One rank's part, in a process group that has been joined; `stack` is closed by the caller.

    changed: what differs from the recipe that the run was begun with, for people
    """
    recipe = made.recipe
    if ranks.is_first:
        stack.enter_context(locked(run))
    parts = assemble(made, run, ranks, Quiet())
    stack.callback(parts.loader.close)
    _agree(made, ranks)
    first, origin = _restore(parts)
    parts = replace(parts, origin=origin)
    if ranks.is_first:
        report = stack.enter_context(_reporting(run, recipe, ranks, progress, first))
        report.resume(first)
        parts = replace(parts, report=report)
        _remember(made, run, report)
    parts.report.note(_start_line(made, run, ranks))
    if (deepspeed := made.placement.deepspeed) is not None:
        parts.report.note(f"DeepSpeed is given {json.dumps(deepspeed)}")
        if ranks.is_first:
            run.deepspeed.write_text(json.dumps(deepspeed, indent=2) + "\n", encoding="utf-8")
    if first:
        parts.report.note(f"resuming {run.root} from step {first}")
        for change in changed:
            parts.report.note(f"changed since it began: {change}")
    done = train(parts, first)
    parts.report.end(done, recipe.train.steps, parts.telemetry.skipped)
    return Outcome(done, recipe.train.steps)


def _start_line(made: Plan, run: RunFolder, ranks: Ranks) -> str:
    """What is about to train, where, and where to look at it."""
    recipe = made.recipe
    count = f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)}"
    seen = tracking.open_command(store_address(run, recipe)) if recipe.tracking.mlflow else "off"
    return f"{recipe.name}: {count} ({made.degrees}) on {ranks.device.type}, into {run.root}, MLflow: {seen}"


def assemble(made: Plan, run: RunFolder, ranks: Ranks, report: Quiet) -> Parts:
    """Everything this rank trains with, standing at the first step."""
    recipe = made.recipe
    clock = Clock(ranks.device)
    engine = build_engine(recipe, made.placement, made.model, ranks, clock)
    telemetry = Telemetry(
        batch=recipe.train.batch,
        flops=made.model.train_flops,
        world_size=ranks.world_size,
        max_skipped=recipe.train.max_skipped,
        precision=recipe.train.precision,
        budget=Budget(recipe.data.max_bad_fraction, made.stream.samples),
        device=ranks.device,
    )
    ema = Ema(engine.parameters(), recipe.train.ema)
    loader = open_loader(made, engine.data_rank, engine.data_size, ranks.device)
    objective = build_objective(recipe)
    return Parts(
        recipe, run, made.degrees, engine, objective, loader, ema, telemetry, clock, report
    )


def open_loader(made: Plan, rank: int, ranks: int, device: torch.device) -> Loader:
    """The share of number `rank` of the `ranks` that read different samples, from the first step."""
    data = made.recipe.data
    decoder = open_reader(made.recipe, made.stream.urls, device)
    share = Share(
        made.stream,
        decoder,
        size=(data.image_size, data.image_size),
        augment=Augment(**data.augment.model_dump()),
        seed=made.recipe.seed,
        batch=made.recipe.train.batch,
        rank=rank,
        ranks=ranks,
        device=device,
    )
    return Loader(share, prefetch=data.prefetch)


def _agree(made: Plan, ranks: Ranks) -> None:
    """Raises UserError, on every rank, where they do not all see the same shards."""
    seen: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(seen, made.stream.fingerprint)
    if other := next((rank for rank, mark in enumerate(seen) if mark != seen[0]), None):
        raise UserError(
            f"rank {other} sees other shards in data.train = {made.recipe.data.train} than rank 0; make them "
            "the same on all machines, or repair what one of them cannot index, and start again"
        )


def _remember(made: Plan, run: RunFolder, report: Quiet) -> None:
    """Write down the shards that this run has, so that a resume has the same, and those left out."""
    past = made.stream.past
    write_past(run.shards, past)
    left_out = [shard for shard in past if shard.left_out is not None]
    Quarantine(run.quarantine).add_shards(left_out)
    if left_out:
        report.note(f"{len(left_out)} shards are left out; {run.quarantine} says why")


def _restore(parts: Parts) -> tuple[int, dict[str, Any]]:
    """Steps 4 and 5 of the contract; the step to go on from, and the run's origin."""
    newest = latest_whole(parts.run.checkpoints)
    if newest is None:
        return 0, {}
    if "loader" not in read_manifest(newest).state:
        state = _begin_from(newest, parts)
    else:
        state = load(newest, checkpoint_tensors(parts))
        check_science(parts.run, state["science"], parts.recipe)
        check_length(parts.run, int(state["step"]), parts.recipe)
        parts.loader.load_state_dict(state["loader"])
        parts.telemetry.load_state_dict(state["telemetry"])
    return int(state["step"]), {key: state[key] for key in ORIGINS if key in state}


def _begin_from(imported: Path, parts: Parts) -> dict[str, Any]:
    """Weights and averages of published weights, which come without optimizer and place in the data."""
    tensors = checkpoint_tensors(parts)
    weights = {n: held for n, held in tensors.items() if not n.startswith("optimizer.")}
    state = load(imported, weights)
    check_science(parts.run, state["science"], parts.recipe)
    return state


@contextmanager
def _reporting(
    run: RunFolder, recipe: Recipe, ranks: Ranks, progress: Progress, first: int
) -> Iterator[Report]:
    """Rank 0's voice: the recipe in the folder, MLflow, and a true status at the end."""
    with ExitStack() as stack:
        write_recipe(recipe, run.recipe)
        if first == 0:
            tracking.forget(run.root)
        tracker = open_tracker(run, recipe, progress.note, begin=True)
        tracker.recipe(recipe.model_dump(mode="json"))
        tracker.environment(ranks.world_size, ranks.device)
        report = Report(run, tracker, progress, recipe)
        stack.callback(report.close)
        try:
            yield report
        except BaseException:
            tracker.close("FAILED")
            raise
        tracker.close("FINISHED" if report.finished else "KILLED")
