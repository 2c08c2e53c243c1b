"""What ranks that share a sequence send each other: to the next one, to each one, to all.

Those that a compiler may meet are operators of their own, which it need not look into.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work, distributed_c10d


class Travelling(NamedTuple):
    """A tensor on its way from the rank before, while `sent` is on its way to the rank after."""

    sent: Tensor
    tensor: Tensor
    works: list[Work]

    def arrived(self) -> Tensor:
        """The tensor, once it and the one sent have come."""
        for work in self.works:
            work.wait()
        return self.tensor


def send_on(tensor: Tensor, group: ProcessGroup) -> Travelling:
    """Send to the next rank of the ring, and receive the like from the one before."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    received = torch.empty_like(tensor)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, group=group, group_peer=(rank + 1) % size),
            dist.P2POp(dist.irecv, received, group=group, group_peer=(rank - 1) % size),
        ]
    )
    return Travelling(tensor, received, works)


def send_to_each(parts: Tensor, group: ProcessGroup) -> Tensor:
    """parts (ranks, ...), one for each rank -> (ranks, ...), one from each rank; differentiable."""
    received: Tensor = _send_to_each(parts.contiguous(), group.group_name)
    return received


@dataclass(frozen=True)
class Rows:
    """Rows on their way from all ranks; `sent` are on their way to them."""

    sent: Tensor
    received: Tensor
    work: Work

    def arrived(self) -> Tensor:
        """The rows, once they have come."""
        self.work.wait()
        return self.received


def send_rows_off(
    rows: Tensor, sending: Sequence[int], receiving: Sequence[int], group: ProcessGroup
) -> Rows:
    """Rows (sum of `sending`, ...) for each rank in turn -> (sum of `receiving`, ...); differentiable.

    sending, receiving: how many go to each rank, and come from it

    Backwards, gradients go back as soon as they are there, and are waited for.
    """
    works: list[Work] = []
    rows = rows.contiguous()  # what travels is to stay where it is until it has
    received = _SendRows.apply(rows, list(sending), list(receiving), group, works)
    return Rows(rows, received, works[0])


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        sending: list[int],
        receiving: list[int],
        group: ProcessGroup,
        works: list[Work],
    ) -> Tensor:
        ctx.sending, ctx.receiving, ctx.group = sending, receiving, group
        received = rows.new_empty(sum(receiving), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, rows, receiving, sending, group=group, async_op=True
        )
        works.append(work)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back = gradient.new_empty(sum(ctx.sending), *gradient.shape[1:])
        dist.all_to_all_single(
            back, gradient.contiguous(), ctx.sending, ctx.receiving, group=ctx.group
        )
        return back, None, None, None, None


def gather_mask(mask: Tensor, group: ProcessGroup) -> Tensor:
    """(batch, 1, 1, local tokens) bool of each rank -> (ranks, batch, 1, 1, local tokens)."""
    gathered: Tensor = _gather(mask.to(torch.uint8).contiguous(), group.group_name)
    return gathered.bool()


def in_dtype_of_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as a context of mixed precision casts what attention computes with."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def named_group(name: str) -> ProcessGroup:
    """The group of that `group_name`; operators take no groups."""
    resolve: Callable[[Any], ProcessGroup] = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)


@torch.library.custom_op("flowmill::send_to_each", mutates_args=())
def _send_to_each(parts: Tensor, group_name: str) -> Tensor:
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=named_group(group_name))
    return received


@_send_to_each.register_fake
def _(parts: Tensor, *_rest: object) -> Tensor:
    return torch.empty_like(parts)


def _remember_group(ctx: Any, inputs: tuple[Tensor, str], **_output: Tensor) -> None:
    ctx.group_name = inputs[1]


def _send_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    """What came from a rank goes back to it."""
    return _send_to_each(gradient.contiguous(), ctx.group_name), None


_send_to_each.register_autograd(_send_back, setup_context=_remember_group)


@torch.library.custom_op("flowmill::gather", mutates_args=())
def _gather(part: Tensor, group_name: str) -> Tensor:
    group = named_group(group_name)
    gathered = part.new_empty(dist.get_world_size(group), *part.shape)
    dist.all_gather(list(gathered.unbind()), part, group=group)
    return gathered


@_gather.register_fake
def _(part: Tensor, group_name: str) -> Tensor:
    group = named_group(group_name)
    return part.new_empty(dist.get_world_size(group), *part.shape)
