"""Everything that can be checked about a run before a process group is made."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.faults import Tolerance
from data_pipeline.samples import Samples
from flows.errors import UserError
from flows.models.family import parameter_count
from parallel.tensor import count_shared
from trainer.assembly import Plan, plan
from trainer.checkpoints.store import list_checkpoints, none_whole
from trainer.engines import accumulates
from trainer.pipelines import copies
from trainer.recipe import Recipe
from trainer.run_folder import RunFolder, check_length, check_place, check_resume
from trainer.tracking import check_address

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Check:
    """One line of what was looked at, and what was found."""

    what: str
    found: str


def check(recipe: Recipe, world_size: int, *, place: bool = True) -> list[Check]:
    """Layout, model on the meta device, shards, run folder and disk. Raises UserError at the first fault.

    place: also whether this process could train in the run folder

    Writes nothing but the shards' index files.
    """
    made = plan(recipe, world_size)
    recipe = made.recipe
    run = RunFolder(Path(recipe.run.dir))
    if place:
        check_place(run)
    if recipe.tracking.mlflow and recipe.tracking.uri is not None:
        check_address(recipe.tracking.uri)
    changed = check_resume(run, recipe)
    with torch.device("meta"):
        parameters = parameter_count(made.model.build())
        share = count_shared(made.model.build(), made.layout.tp) * copies(recipe) // made.layout.pp
    state = made.placement.state_bytes(
        share, len(recipe.train.ema), accumulates(recipe, made.layout)
    )
    checkpoint_bytes = 4 * parameters * (3 + len(recipe.train.ema))
    free = _free_disk(run.root)
    count = recipe.checkpoint.keep + 1
    if free < checkpoint_bytes * count:
        raise UserError(
            f"run.dir = {run.root} has {_size(free)} free, and {count} checkpoints need "
            f"{_size(checkpoint_bytes * count)}; free some, choose another folder, or lower "
            "checkpoint.keep."
        )
    return [
        *_layout_checks(made),
        Check("model", f"{parameters:,} trainable parameters"),
        Check("step", f"{made.model.train_flops * recipe.train.batch / 1e9:.1f} GFLOP"),
        Check("memory a rank", f"{_size(state)} before activations"),
        *_data_checks(made),
        Check("checkpoint", f"{_size(checkpoint_bytes)} each, {_size(free)} free"),
        Check("run folder", _run_state(run, recipe, changed)),
    ]


def _layout_checks(made: Plan) -> list[Check]:
    layout, train = made.layout, made.recipe.train
    micro = min(train.microbatch or made.local_batch, made.local_batch)
    ranks = "1 rank" if layout.data_size == 1 else f"{layout.data_size} ranks"
    batch = f"{train.batch} = {ranks} x {made.local_batch}, microbatch {micro}"
    checks = [Check("layout", made.degrees), Check("batch", batch)]
    if made.placement.deepspeed is not None:
        checks.append(Check("DeepSpeed", json.dumps(made.placement.deepspeed)))
    return checks


def _data_checks(made: Plan) -> list[Check]:
    stream, train = made.stream, made.recipe.train
    taken = stream.order.taken(train.steps * train.batch)
    checks = [
        Check(
            "shards" if len(taken) == 1 else f"shards of {url}",
            f"{len(one.sizes)} shards, {samples:,} samples, {count / samples:.1f} epochs",
        )
        for (url, _), one, samples, count in zip(
            made.recipe.data.sources, stream.sets, stream.epochs, taken, strict=True
        )
    ]
    data = made.recipe.data
    if data.heldout is not None:
        tolerate = Tolerance(data.max_bad_fraction, None, None)
        heldout = Samples(data.heldout, classes=data.classes, tolerate=tolerate)
        checks.append(Check("held out", f"{len(heldout.urls)} shards, {len(heldout):,} samples"))
        heldout.close()
    return checks


def _run_state(run: RunFolder, recipe: Recipe, changed: list[str]) -> str:
    found = list_checkpoints(run.checkpoints)
    if not found:
        return "new"
    whole = [checkpoint for checkpoint in found if checkpoint.damage is None]
    if not whole:
        raise none_whole(run.checkpoints, len(found), str(found[-1].damage))
    check_length(run, whole[-1].step, recipe)
    damaged = [f"step {c.step} is damaged" for c in found if c.step > whole[-1].step]
    change = [f"changed: {', '.join(changed)}"] if changed else []
    return "; ".join([f"resumes from step {whole[-1].step}", *damaged, *change])


def _size(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"


def _free_disk(folder: Path) -> int:
    """Free bytes where the folder is, or will be."""
    existing = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    return shutil.disk_usage(existing).free
