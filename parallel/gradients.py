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
from torch.distributed.tensor import DTensor, Partial

EPSILON = 1e-6

Cut = tuple[ProcessGroup, ...]


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """() float32 L2 norm of all gradients, the same on every rank (also when it is not finite)."""
    groups: dict[Cut, list[Tensor]] = {}
    device = torch.device("cpu")
    for parameter in parameters:
        device = parameter.device
        gradient = parameter.grad
        if gradient is not None:
            groups.setdefault(_cut(gradient), []).append(_local(gradient))
    total = torch.zeros((), dtype=torch.float32, device=device)
    for cut, gradients in groups.items():
        total += _squares(gradients, cut)
    return total.sqrt()


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)) in place; None leaves them.

    Returns the norm before. A norm that is not finite spoils every gradient: skip that step.
    """
    listed = list(parameters)
    norm = gradient_norm(listed)
    gradients = [_local(p.grad) for p in listed if p.grad is not None]
    if max_norm is not None and gradients:
        torch._foreach_mul_(gradients, (max_norm / (norm + EPSILON)).clamp(max=1.0))
    return norm


def _squares(gradients: list[Tensor], cut: Cut) -> Tensor:
    """Sum of squares over the local parts, then over the ranks that hold the other parts."""
    norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)
    total = torch.stack(list(norms)).square().sum()
    for group in cut:
        dist.all_reduce(total, group=group)
    return total


def _cut(gradient: Tensor) -> Cut:
    """The process groups along which the gradient lies in different parts."""
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    cut = []
    for axis, placement in enumerate(gradient.placements):
        if isinstance(placement, Partial):
            raise ValueError("a gradient is not summed over its mesh yet, so it has no norm")
        if placement.is_shard() and mesh.size(axis) > 1:
            cut.append(mesh.get_group(axis))
    return tuple(cut)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
