"""Sequences over ranks: which tokens each has, and how they travel, forwards and backwards.

`Deal` says which tokens of a sequence a rank has. A region of a model (`flows.models.division.Region`) is
entered by one of the ways to divide tokens and left by one of the ways to have them all again; outside,
everything is computed alike on all ranks of the group. What is right backwards depends on who adds up
gradients:

context parallelism     gradients of all parameters are averaged over the group afterwards (as over data
                        ranks), so they need to be right on average alone: enter by `Deal.share`
                        (backwards: zeros for the others' tokens), leave by `gather_summed` (backwards:
                        everybody's gradients of the own tokens are summed).
sequence parallelism    nothing is averaged over the group, and what is computed alike outside must have
                        equal, whole gradients: enter by `split` (backwards: gathers), leave by `gather`
                        (backwards: own tokens). Gradients of parameters used inside are partial, and
                        vectors for a whole sample go through `copied`.

Within sequence parallelism, a pair of divided matrix products is entered by `gather_summed` and left by
`scattered`; without, by `copied` and `reduced`. All of them are functions of tensors that autograd and
torch.compile see through, on any device, and wait for nothing on the host.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True, eq=False)
class Deal:
    """How the tokens of a sequence are dealt out to the ranks of a group.

    Each part is cut into equal chunks, padded with zeros behind its end where they do not come out even;
    a rank has one chunk of every part, or two of them (zigzag: chunks r and 2 n - 1 - r), in this order.

    parts: lengths of the parts, one behind the other
    index, count: this rank's place in the group, and its size
    """

    parts: tuple[int, ...]
    index: int
    count: int
    group: ProcessGroup
    zigzag: bool = False

    @property
    def chunks(self) -> int:
        return 2 * self.count if self.zigzag else self.count

    @property
    def local_parts(self) -> tuple[int, ...]:
        """Lengths of the parts as each rank has them, padding included."""
        each = self.chunks // self.count
        return tuple(each * -(-part // self.chunks) for part in self.parts)

    @property
    def padded(self) -> bool:
        return any(part % self.chunks for part in self.parts)

    def share(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of the whole sequence; no communication."""
        return self._shares(x, dim, [self.index])[0]

    def shares(self, x: Tensor, dim: int = 1) -> list[Tensor]:
        """The tokens of every rank."""
        return self._shares(x, dim, range(self.count))

    def joined(self, shares: list[Tensor], dim: int = 1) -> Tensor:
        """The whole sequence from all ranks' tokens, without padding."""
        if len(self.parts) == 1 and not self.zigzag:
            return torch.cat(shares, dim).narrow(dim, 0, self.parts[0])
        by_rank = [share.split(self.local_parts, dim) for share in shares]
        whole = []
        for part, pieces in zip(self.parts, zip(*by_rank, strict=True), strict=True):
            chunks = list(pieces)
            if self.zigzag:
                halves = [piece.chunk(2, dim) for piece in pieces]
                chunks = [first for first, _ in halves] + [last for _, last in reversed(halves)]
            whole.append(torch.cat(chunks, dim).narrow(dim, 0, part))
        return torch.cat(whole, dim)

    def _shares(self, x: Tensor, dim: int, ranks: "range | list[int]") -> list[Tensor]:
        by_part = []
        for part in x.split(self.parts, dim):
            missing = -part.shape[dim] % self.chunks
            if missing:
                behind = [0, 0] * (x.dim() - 1 - dim % x.dim())
                part = F.pad(part, (*behind, 0, missing))
            by_part.append(part.chunk(self.chunks, dim))
        return [
            torch.cat([chunks[place] for chunks in by_part for place in self._places(rank)], dim)
            for rank in ranks
        ]

    def _places(self, rank: int) -> tuple[int, ...]:
        return (rank, self.chunks - 1 - rank) if self.zigzag else (rank,)


def split(x: Tensor, deal: Deal) -> Tensor:
    """This rank's tokens of (batch, tokens, ...); backwards, everybody's gradients are gathered."""
    result: Tensor = _Split.apply(x, deal)
    return result


def gather(x: Tensor, deal: Deal) -> Tensor:
    """All tokens from everybody's (batch, local tokens, ...); backwards, this rank's gradients."""
    result: Tensor = _Gather.apply(x, deal)
    return result


def gather_summed(x: Tensor, deal: Deal) -> Tensor:
    """All tokens, of which every rank makes something else; backwards, gradients are summed and dealt."""
    result: Tensor = _GatherSummed.apply(x, deal)
    return result


def scattered(x: Tensor, deal: Deal) -> Tensor:
    """This rank's tokens of the sum of everybody's (batch, tokens, ...); backwards, gathers."""
    result: Tensor = _Scattered.apply(x, deal)
    return result


def copied(x: Tensor, group: ProcessGroup) -> Tensor:
    """`x`, of which every rank makes something else; backwards, gradients are summed."""
    result: Tensor = _Copied.apply(x, group)
    return result


def reduced(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of everybody's `x`; backwards, the gradient as it is."""
    result: Tensor = _Reduced.apply(x, group)
    return result


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, deal: Deal) -> Tensor:
        ctx.deal = deal
        return deal.share(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradient, ctx.deal), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, deal: Deal) -> Tensor:
        ctx.deal = deal
        return all_gather(x, deal)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.deal.share(gradient), None


class _GatherSummed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, deal: Deal) -> Tensor:
        ctx.deal = deal
        return all_gather(x, deal)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(gradient, ctx.deal), None


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, deal: Deal) -> Tensor:
        ctx.deal = deal
        return reduce_scatter(x, deal)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_gather(gradient, ctx.deal), None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


def all_gather(x: Tensor, deal: Deal) -> Tensor:
    """All tokens from everybody's (batch, local tokens, ...); not differentiable."""
    ops, name = torch.ops._c10d_functional, deal.group.group_name
    every = ops.all_gather_into_tensor(x.contiguous(), deal.count, name)
    return deal.joined(list(ops.wait_tensor(every).chunk(deal.count)))


def reduce_scatter(x: Tensor, deal: Deal) -> Tensor:
    """This rank's tokens of the sum of everybody's (batch, tokens, ...); not differentiable."""
    ops, name = torch.ops._c10d_functional, deal.group.group_name
    every = torch.cat(deal.shares(x)).contiguous()
    result: Tensor = ops.wait_tensor(ops.reduce_scatter_tensor(every, "sum", deal.count, name))
    return result


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of everybody's `x`, in new memory; not differentiable."""
    ops = torch.ops._c10d_functional
    result: Tensor = ops.wait_tensor(ops.all_reduce(x.contiguous(), "sum", group.group_name))
    return result
