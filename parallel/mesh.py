"""The layout: how ranks are divided among the ways of being parallel, and the mesh that says so.

Axes, outermost first (neighbours in `tp` talk most, so they are closest):
    pp         stages of the network
    replicate  whole copies of the model, on different samples
    shard      parts of each parameter, on different samples
    cp         parts of each sequence
    tp         parts of each matrix product
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flows.errors import UserError

Strategy = Literal["none", "ddp", "fsdp", "hsdp"]
AXES = ("pp", "replicate", "shard", "cp", "tp")
DATA_AXES = ("replicate", "shard")


@dataclass(frozen=True)
class Layout:
    """The size of each axis; their product is the number of ranks.

    strategy: how the model lies over the data axes, `Strategy` or another engine's word for it
    """

    strategy: str
    pp: int
    replicate: int
    shard: int
    cp: int
    tp: int

    @property
    def world_size(self) -> int:
        return self.pp * self.replicate * self.shard * self.cp * self.tp

    @property
    def data_size(self) -> int:
        """Ranks (or groups of ranks) that read different samples."""
        return self.replicate * self.shard


def resolve_layout(
    strategy: Strategy | None, replicate: int | None, shard: int | None, world_size: int
) -> Layout:
    """Fill in what was left to be inferred, and check the whole; needs no process group.

    strategy: None for "none" on one rank and "fsdp" on several
    replicate, shard: None to be inferred
    Raises UserError with the values that would work.
    """
    chosen = strategy or ("none" if world_size == 1 else "fsdp")
    if chosen not in get_args(Strategy):
        raise UserError(
            f"parallel.strategy = {chosen} is not known; "
            f"use {', '.join(get_args(Strategy))} or null."
        )
    if chosen == "hsdp":
        replicate, shard = _hybrid(replicate, shard, world_size)
    else:
        replicate, shard = _single_axis(chosen, replicate, shard, world_size)
    return Layout(chosen, pp=1, replicate=replicate, shard=shard, cp=1, tp=1)


def _single_axis(
    strategy: Strategy, replicate: int | None, shard: int | None, world_size: int
) -> tuple[int, int]:
    """none, ddp and fsdp: one axis has all the ranks, so each degree has one right value."""
    if strategy == "none" and world_size != 1:
        raise UserError(
            f"parallel.strategy = none needs 1 rank but there are {world_size}; "
            "use ddp, fsdp or hsdp."
        )
    right = {
        "replicate": world_size if strategy == "ddp" else 1,
        "shard": world_size if strategy == "fsdp" else 1,
    }
    for key, asked in (("replicate", replicate), ("shard", shard)):
        if asked not in (None, right[key]):
            raise UserError(
                f"parallel.{key} = {asked} does not fit parallel.strategy = {strategy} on "
                f"{_ranks(world_size)}; use parallel.{key} = {right[key]} or null"
                + (", or parallel.strategy = hsdp." if _has_hybrids(world_size) else ".")
            )
    return right["replicate"], right["shard"]


def _hybrid(replicate: int | None, shard: int | None, world_size: int) -> tuple[int, int]:
    """hsdp: both degrees above 1; one or both may be inferred (both: two copies of the model)."""
    if not _has_hybrids(world_size):
        raise UserError(
            "parallel.strategy = hsdp needs a number of ranks that is a product of two numbers "
            f"above 1, not {world_size}; use fsdp or ddp, or another number of ranks."
        )
    pairs = [
        (copies, world_size // copies)
        for copies in range(2, world_size)
        if world_size % copies == 0
    ]
    for pair in pairs:
        if replicate in (None, pair[0]) and shard in (None, pair[1]):
            return pair
    working = ", ".join(f"{copies} x {parts}" for copies, parts in pairs)
    raise UserError(
        f"parallel.replicate = {_null(replicate)} and parallel.shard = {_null(shard)} do not make "
        f"{_ranks(world_size)} under parallel.strategy = hsdp; replicate x shard may be {working}."
    )


def build_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """One mesh with all axes, those of size 1 included; a collective over all ranks."""
    return init_device_mesh(
        device.type, tuple(getattr(layout, axis) for axis in AXES), mesh_dim_names=AXES
    )


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's place among `Layout.data_size`; ranks that share samples share it."""
    return mesh.get_local_rank("replicate") * mesh["shard"].size() + mesh.get_local_rank("shard")


def _has_hybrids(world_size: int) -> bool:
    return any(world_size % copies == 0 for copies in range(2, world_size))


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _null(value: int | None) -> str:
    return "null" if value is None else str(value)
