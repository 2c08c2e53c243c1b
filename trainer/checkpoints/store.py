"""Save, load, list and verify the checkpoints of a run.

A checkpoint holds flat canonical names -> tensors (`model.blocks.0.attention.qkv.weight`,
`ema.0.999.<name>`, `optimizer.<name>.exp_avg`) and a small JSON state. Nothing in it depends on
the layout that wrote it: tensors are cut into whatever boxes the ranks held, and a rank of any
other layout reads the parts it needs. `save`, `load`, `damage` and `latest_whole` are collectives
where a process group exists: every rank succeeds, or every rank raises.
"""

import datetime
import logging
import shutil
import warnings
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as planned_load
from torch.distributed.checkpoint.state_dict_saver import save as planned_save
from torch.distributed.tensor import DTensor

from flows.errors import UserError
from parallel.pieces import FlatPiece, Held, Slice
from trainer.checkpoints.commit import begin, commit, committed, retire, writing_folder
from trainer.checkpoints.manifest import (
    FORMAT_VERSION,
    FileEntry,
    Manifest,
    TensorEntry,
    damaged_contents,
    damaged_sizes,
    read_manifest,
)
from trainer.checkpoints.plans import LoadPlanner, SavePlanner, planned
from trainer.checkpoints.shards import DTYPES, ShardReader, ShardWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One committed checkpoint: bytes on disk, and what is damaged in it (None: whole)."""

    step: int
    path: Path
    size: int
    damage: str | None


def save(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Held],
    state: dict[str, Any],
    keep: int,
    refused: Container[int] = (),
) -> Path:
    """Commit `tensors` and `state` as the checkpoint of `step`, keep the newest `keep`; its path.

    refused: steps whose checkpoints are not among those, see `retire`

    Every rank gives what it holds by name: plain tensors (replicas, equal on all ranks that have the name),
    DTensors, `Slice`s or `FlatPiece`s; each part is written by one of the ranks that hold it. Rank 0's
    `state` is the one kept.
    UserError on every rank, with the folder as it was, where one rank cannot write.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep} checkpoints would delete the one just written")
    layout = _layout(tensors)

    def write_and_retire(entries: dict[str, TensorEntry], files: dict[str, FileEntry]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        version = str(torch.__version__)
        commit(folder, Manifest(FORMAT_VERSION, step, now, version, layout, state, files, entries))
        retire(folder, step, keep, refused)

    writing = writing_folder(folder, step)
    writer = ShardWriter(writing, lambda: begin(folder, step), write_and_retire)
    try:
        with _quiet_without_ranks():
            planned_save(
                planned(tensors),
                storage_writer=writer,
                planner=SavePlanner(),
                no_dist=not _distributed(),
            )
    except CheckpointException as error:
        if _rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)  # give the disk its room back
        raise _as_user_error(error, f"checkpoint of step {step} was not written") from error
    return folder / f"step-{step:08d}"


def load(checkpoint: Path, tensors: Mapping[str, Held], *, prefix: str = "") -> dict[str, Any]:
    """Fill `tensors` in place from one checkpoint, each rank its own part; the saved state.

    Names, shapes and dtypes must be those of the checkpoint. With a `prefix`, only the tensors
    whose names begin with it are meant (`ema.0.999.` to sample). Ranks may ask for different
    names, which together must be all. Checksums are not computed here: see `damage` and
    `latest_whole`.
    """
    with _together():
        manifest = read_manifest(checkpoint)
    wanted = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    with _together():
        _check_tensors(checkpoint, wanted, tensors)
    unasked = set.intersection(*_gather(wanted.keys() - tensors.keys()))
    if unasked:
        raise UserError(
            f"{checkpoint}: tensor {min(unasked)} is in the checkpoint and not in this model "
            f"({len(unasked)} such); use the recipe that wrote the checkpoint."
        )
    try:
        with _quiet_without_ranks():
            planned_load(
                planned(tensors),
                storage_reader=ShardReader(checkpoint, manifest),
                planner=LoadPlanner(),
                no_dist=not _distributed(),
            )
    except CheckpointException as error:
        raise _as_user_error(error, f"{checkpoint} was not read") from error
    return manifest.state


def list_checkpoints(folder: Path, *, checksums: bool = False) -> list[Checkpoint]:
    """The committed checkpoints in `folder`, oldest first; `checksums`: read every byte."""
    return [inspect(path, checksums=checksums) for _, path in committed(folder)]


def inspect(checkpoint: Path, *, checksums: bool) -> Checkpoint:
    """One checkpoint seen by this process alone; UserError where `checkpoint` is no such folder."""
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint}: no such checkpoint; `flowmill checkpoint list RUN` names those there are."
        )
    named = {path: step for step, path in committed(checkpoint.parent)}
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        return Checkpoint(named.get(checkpoint, -1), checkpoint, size, str(error))
    damage = damaged_sizes(checkpoint, manifest)
    if damage is None and checksums:
        damage = damaged_contents(checkpoint, manifest, manifest.files)
    return Checkpoint(manifest.step, checkpoint, size, damage)


def damage(checkpoint: Path) -> str | None:
    """What is damaged in `checkpoint`, or None; each rank reads its share of the files whole."""
    try:
        manifest = read_manifest(checkpoint)
        found = damaged_sizes(checkpoint, manifest)
    except UserError as error:
        found = str(error)
    if found is None:
        share = sorted(manifest.files)[_rank() :: _ranks()]
        found = damaged_contents(checkpoint, manifest, share)
    return next((one for one in _gather(found) if one is not None), None)


def latest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is whole to the last byte; None where there is none.

    Damaged ones are passed over with a warning that names the file. UserError where all are
    damaged: to begin anew would look like a resume.
    """
    found: list[Path] = _gather([path for _, path in committed(folder)])[
        0
    ]  # rank 0's view is everybody's
    first = None
    for path in reversed(found):
        wrong = damage(path)
        if wrong is None:
            return path
        first = first or wrong
        if _rank() == 0:
            logger.warning("checkpoint %s is damaged (%s); trying the one before", path, wrong)
    if first:
        raise none_whole(folder, len(found), first)
    return None


def none_whole(folder: Path, count: int, damage: str) -> UserError:
    """What to say where all `count` checkpoints in `folder` are damaged, the newest of them so."""
    return UserError(
        f"{folder}: none of the {count} checkpoints is whole ({damage.rstrip('.')}); "
        "restore one from a copy, or give the run another run.dir to begin anew."
    )


def _check_tensors(
    checkpoint: Path, wanted: Mapping[str, TensorEntry], tensors: Mapping[str, Held]
) -> None:
    """UserError for the first tensor that is not in the checkpoint as this rank has it."""
    for name, tensor in tensors.items():
        entry = wanted.get(name)
        if entry is None:
            raise UserError(
                f"{checkpoint}: tensor {name} is missing; use the recipe that wrote the checkpoint."
            )
        if tuple(tensor.shape) != entry.shape or DTYPES[tensor.dtype] != entry.dtype:
            raise UserError(
                f"{checkpoint}: tensor {name} is {entry.dtype} {list(entry.shape)} and the model "
                f"wants {DTYPES[tensor.dtype]} {list(tensor.shape)}; use the recipe that wrote it."
            )


def _layout(tensors: Mapping[str, Held]) -> str:
    """For people: `4 ranks, mesh replicate=2 shard=2`, `2 ranks, slices 2`, or `2 ranks, cut flat`."""
    slices = [held for held in tensors.values() if isinstance(held, Slice)]
    dtensors = [held.local if isinstance(held, Slice) else held for held in tensors.values()]
    meshes = {tensor.device_mesh for tensor in dtensors if isinstance(tensor, DTensor)}
    names = sorted(
        " ".join(
            f"{name}={size}" for name, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True)
        )
        if mesh.mesh_dim_names
        else " x ".join(map(str, mesh.shape))
        for mesh in meshes
    )
    count = f"{_ranks()} rank{'s' * (_ranks() > 1)}"
    flat = ["cut flat"] if any(isinstance(held, FlatPiece) for held in tensors.values()) else []
    sliced = [f"slices {ways}" for ways in sorted({held.cut.count for held in slices})]
    return ", ".join([count, *(f"mesh {name}" for name in names), *sliced, *flat])


def _as_user_error(error: CheckpointException, what: str) -> BaseException:
    """The first rank's failure as one sentence if a user can mend it, else `error` as it came."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, UserError):
        return cause
    if isinstance(cause, OSError):
        return UserError(
            f"{what}: rank {rank} failed on {cause.filename} ({cause.strerror}); see that every "
            "rank reaches the folder and that there is room, then run again (older checkpoints are "
            "untouched)."
        )
    if isinstance(cause, SafetensorError):
        return UserError(
            f"{what}: rank {rank} found a damaged file ({cause}); use another checkpoint."
        )
    return error


@contextmanager
def _together() -> Iterator[None]:
    """What one rank refuses, all ranks refuse, with the same sentence."""
    refused: UserError | None = None
    try:
        yield
    except UserError as error:
        refused = error
    first = next((one for one in _gather(refused and str(refused)) if one is not None), None)
    if first is not None:
        raise UserError(first) from refused


def _gather(value: Any) -> list[Any]:
    """`value` of every rank, on every rank."""
    if not _distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _ranks() -> int:
    return dist.get_world_size() if _distributed() else 1


@contextmanager
def _quiet_without_ranks() -> Iterator[None]:
    """A single process is a layout like any other and no cause for a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
