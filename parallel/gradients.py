"""The global gradient norm and clipping, for any mixture of whole and cut parameters.

A parameter's squared norm is the sum over its parts, and its parts lie along the mesh axes it is
cut over, and only those: along the others are copies, which would be counted twice. So gradients
are grouped by the axes they are cut over, each group's squares are summed here and then over its
axes, one small all-reduce an axis. Nothing is gathered and nothing waits for the device.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement

from parallel.pieces import Slice, local_part

EPSILON = 1e-6

Groups = tuple[ProcessGroup, ...]


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor | Slice]) -> Tensor:
    """() float32 L2 norm of all gradients, the same on every rank (also when it is not finite)."""
    return _norm(_by_cut(parameters))


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor | Slice], max_norm: float | None) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)) in place; None leaves them.

    Returns the norm before. A norm that is not finite spoils every gradient: skip that step.
    """
    cut = _by_cut(parameters)
    norm = _norm(cut)
    pieces = [piece for pieces in cut.values() for piece in pieces]
    if max_norm is not None and pieces:
        torch._foreach_mul_(pieces, (max_norm / (norm + EPSILON)).clamp(max=1.0))
    return norm


@torch.no_grad()
def sum_partial(parameters: Iterable[Tensor], group: ProcessGroup) -> None:
    """Sum the gradients of whole parameters that ranks of `group` applied to parts of the work, in place.

    One message for all of them; they are to have gradients on all ranks or on none.
    """
    pieces = [local_part(p.grad) for p in parameters if p.grad is not None]
    if not pieces:
        return
    line = torch.cat([piece.flatten() for piece in pieces])
    dist.all_reduce(line, group=group)
    sums = line.split([piece.numel() for piece in pieces])
    torch._foreach_copy_(pieces, [s.view_as(piece) for s, piece in zip(sums, pieces, strict=True)])


def _norm(cut: dict[Groups, list[Tensor]]) -> Tensor:
    if not cut:
        return torch.zeros(())
    squares = [_squares(pieces, groups) for groups, pieces in cut.items()]
    return torch.stack(squares).sum().sqrt()


def _squares(pieces: list[Tensor], groups: Groups) -> Tensor:
    """Sum of squares over the pieces held here, then over the ranks that hold the others."""
    norms = torch._foreach_norm(pieces, 2.0, dtype=torch.float32)
    total = torch.stack(list(norms)).square().sum()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


def _by_cut(parameters: Iterable[Tensor | Slice]) -> dict[Groups, list[Tensor]]:
    """Local gradients by the process groups along which they differ, in one order on all ranks."""
    cut: dict[Groups, list[Tensor]] = {}
    known: dict[tuple[DeviceMesh, tuple[Placement, ...]], Groups] = {}
    for parameter in parameters:
        own: Groups = (parameter.cut.group,) if isinstance(parameter, Slice) else ()
        gradient = (parameter.local if isinstance(parameter, Slice) else parameter).grad
        if gradient is None:
            continue
        if isinstance(gradient, DTensor):
            place = (gradient.device_mesh, gradient.placements)
            if place not in known:
                known[place] = _groups(*place)
            own = known[place] + own
        cut.setdefault(own, []).append(local_part(gradient))
    return cut


def _groups(mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Groups:
    """The process groups along which a tensor lies in different pieces."""
    if any(isinstance(placement, Partial) for placement in placements):
        raise ValueError("a gradient is not summed over its mesh yet, so it has no norm")
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(placements)
        if placement.is_shard() and mesh.size(axis) > 1
    )
