"""The layout: how ranks are divided among the ways of being parallel, and the mesh that says so.

Axes, outermost first (neighbours in `tp` talk most, so they are closest):
    pp         stages of the network
    replicate  whole copies of the model, on different samples
    shard      parts of each parameter, on different samples
    cp         parts of each sequence
    tp         parts of each matrix product
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flows.errors import UserError

Strategy = Literal["none", "ddp", "fsdp", "hsdp"]
# Of parts of one sequence: by exchanging heads for tokens, or by passing keys and values round.
Context = Literal["ulysses", "ring"]
AXES = ("pp", "replicate", "shard", "cp", "tp")
DATA_AXES = ("replicate", "shard")  # along which ranks read different samples
PEER_AXES = ("cp", "tp")  # along which they share them


@dataclass(frozen=True)
class Layout:
    """The size of each axis; their product is the number of ranks.

    strategy: how the model lies over the data axes, `Strategy` or another engine's word for it
    context: how ranks along `cp` attend to each other's tokens
    sequence: between matrix products, ranks along `tp` have parts of the tokens, too
    ep: ranks that experts are divided over, of the `shard` x `cp` ranks of a copy of the model
    """

    strategy: str
    pp: int
    replicate: int
    shard: int
    cp: int
    tp: int
    context: Context = "ulysses"
    sequence: bool = False
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.pp * self.replicate * self.shard * self.cp * self.tp

    @property
    def data_size(self) -> int:
        """Ranks (or groups of ranks) that read different samples."""
        return self.replicate * self.shard


def resolve_layout(
    strategy: Strategy | None,
    replicate: int | None,
    shard: int | None,
    world_size: int,
    *,
    tp: int = 1,
    cp: int = 1,
    context: Context = "ulysses",
    sequence: bool = False,
    ep: int = 1,
    pp: int = 1,
) -> Layout:
    """Fill in what was left to be inferred, and check the whole; needs no process group.

    pp: ranks of a pipeline; below, `world_size` is that of those with the same place in theirs
    strategy: how the model lies over the ranks that do not share matrix products, which are `world_size
        / tp`; None for "none" where that is one rank, and "fsdp" where they are several
    replicate, shard: None to be inferred; their product is `world_size / (tp * cp)`
    Raises UserError with the values that would work.
    """
    ranks = _data_ranks(world_size, pp, tp, cp)
    asked = strategy, shard
    world_size //= pp
    chosen = strategy or ("none" if ranks * cp == 1 else "fsdp")
    if chosen not in get_args(Strategy):
        raise UserError(
            f"parallel.strategy = {chosen} is not known; "
            f"use {', '.join(get_args(Strategy))} or null."
        )
    if chosen == "none" and ranks * cp != 1:
        raise UserError(
            f"parallel.strategy = none needs {_ranks(tp)} but there are {world_size}; "
            "use ddp, fsdp or hsdp."
        )
    if chosen == "hsdp":
        replicate, shard = _hybrid(replicate, shard, ranks, cp)
    else:
        replicate, shard = _single_axis(chosen, replicate, shard, ranks)
    if ep > 1:
        copies = replicate if chosen == "hsdp" else 1
        enough = pp * copies * math.lcm(cp, ep) * tp
        _check_ep(chosen, asked, ranks * cp, shard * cp, ep, enough)
    return Layout(
        chosen,
        pp=pp,
        replicate=replicate,
        shard=shard,
        cp=cp,
        tp=tp,
        context=context,
        sequence=sequence,
        ep=ep,
    )


def _check_ep(
    chosen: str, asked: tuple[str | None, int | None], ranks: int, cut: int, ep: int, enough: int
) -> None:
    """
    asked: strategy and shard, as they were given
    ranks: that read different samples or parts of them
    cut: that one copy of the model is cut over
    enough: a number of ranks whose multiples `ep` can be had on
    """
    strategy, shard = asked
    start = f"start {enough} ranks or a multiple of it"
    if chosen == "ddp":
        remedy = "use fsdp or hsdp" if ranks % ep == 0 else f"use fsdp, and {start}"
        raise UserError(
            f"parallel.ep = {ep} divides experts over the ranks that weights are cut over, and "
            f"parallel.strategy = ddp cuts none; {remedy}."
        )
    if cut % ep:
        keys = ["parallel.strategy=fsdp"] if strategy == "none" else []
        keys += ["parallel.shard=null"] if shard is not None else []
        without = f", with {' and '.join(keys)}" if keys else ""
        raise UserError(
            f"parallel.ep = {ep} does not divide the {_ranks(cut)} that one copy of the model is cut over "
            f"(parallel.shard x parallel.cp); it may be {divisors(cut)}, or {start}{without}."
        )


def _data_ranks(world_size: int, pp: int, tp: int, cp: int) -> int:
    """Ranks (or groups of ranks) that read different samples."""
    product = pp * tp * cp
    if world_size % product:
        given = [(key, size) for key, size in (("pp", pp), ("tp", tp), ("cp", cp)) if size > 1]
        keys = " x ".join(f"parallel.{key} = {size}" for key, size in given)
        raise UserError(
            f"{keys} does not divide {_ranks(world_size)}; {'it' if len(given) == 1 else 'their product'} "
            f"may be {divisors(world_size)}, or start {product} ranks or a multiple of it."
        )
    return world_size // product


def _single_axis(
    strategy: Strategy, replicate: int | None, shard: int | None, world_size: int
) -> tuple[int, int]:
    """none, ddp and fsdp: one axis has all the ranks, so each degree has one right value.

    world_size: of the ranks that read different samples
    """
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


def _hybrid(replicate: int | None, shard: int | None, world_size: int, cp: int) -> tuple[int, int]:
    """hsdp: more than one copy, each over more than one rank; what is inferred has two copies, if it can.

    world_size: of the ranks that read different samples; a copy lies over shard x cp ranks
    """
    pairs = [
        (copies, world_size // copies)
        for copies in range(2, world_size + 1)
        if world_size % copies == 0 and world_size // copies * cp > 1
    ]
    if not pairs:
        raise UserError(
            "parallel.strategy = hsdp needs a number of ranks that is a product of two numbers "
            f"above 1, not {world_size}; use fsdp or ddp, or another number of ranks."
        )
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


def groups_along(mesh: DeviceMesh, axes: Sequence[str]) -> list[ProcessGroup]:
    """The process groups of this rank along those of the axes that have several ranks."""
    return [mesh.get_group(axis) for axis in axes if mesh[axis].size() > 1]


def averaging_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The ranks over which gradients are averaged: copies of the model x what one copy is cut over.

    Ranks that have parts of one sequence average as if they had different samples: a copy is cut over
    `shard` x `cp`; where nothing is cut, there are `replicate` x `cp` copies. One axis, two for hsdp.
    """
    if layout.strategy == "ddp":
        return _with_cp(mesh, layout, "replicate")
    if layout.strategy != "hsdp":
        return _with_cp(mesh, layout, "shard")
    if layout.cp == 1:
        return mesh["replicate", "shard"]
    return DeviceMesh._concatenate([mesh["replicate"], _with_cp(mesh, layout, "shard")])


def _with_cp(mesh: DeviceMesh, layout: Layout, axis: str) -> DeviceMesh:
    return mesh[axis] if layout.cp == 1 else mesh[axis, "cp"]._flatten(f"{axis}_cp")


def data_rank(mesh: DeviceMesh) -> int:
    """This rank's place among `Layout.data_size`; ranks that share samples share it."""
    return mesh.get_local_rank("replicate") * mesh["shard"].size() + mesh.get_local_rank("shard")


def divisors(number: int) -> str:
    """In words."""
    fits = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f"{', '.join(fits[:-1])}{' or ' if fits[:-1] else ''}{fits[-1]}"


def _has_hybrids(world_size: int) -> bool:
    return any(world_size % copies == 0 for copies in range(2, world_size))


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _null(value: int | None) -> str:
    return "null" if value is None else str(value)
