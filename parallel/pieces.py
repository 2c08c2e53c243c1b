"""What a rank holds of a tensor: all of it, a DTensor, a slice, or a run of elements as ZeRO cuts it.

Tensor and expert parallelism cut a parameter along one dimension, a fused one stretch by stretch, and
what is left may be cut once more over the data ranks: `Slice`. ZeRO lays parameters end to end and cuts
the line, so a rank's part begins and ends anywhere in a parameter: `FlatPiece`. No DTensor says either;
these do, and they know which boxes of the whole tensor they are made of, which is all that initial
values, averages and checkpoints ask.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Offsets = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FlatPiece:
    """The elements `start`, `start + 1`, ... of a tensor in row-major order.

    local: (length,) this rank's own memory, contiguous; may have no elements
    shape: of the whole tensor
    """

    local: Tensor
    shape: torch.Size
    start: int

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    def detach(self) -> "FlatPiece":
        """The same memory, out of any graph."""
        return replace(self, local=self.local.detach())

    def clone(self) -> "FlatPiece":
        """The same place with memory of its own."""
        return replace(self, local=self.local.clone())

    def boxes(self) -> Iterator[tuple[Offsets, Tensor]]:
        """Where each box of this piece begins in the whole tensor, and the box, a view; in order.

        At most 2 d - 1 boxes for d dimensions: the rest of a row, whole rows, the beginning of one.
        A tensor without elements is one box, so that it is known of.
        """
        if self.shape.numel() == 0:
            yield (0,) * len(self.shape), self.local.view(self.shape)
        done = 0
        for offsets, sizes in _boxes(tuple(self.shape), self.start, self.start + len(self.local)):
            count = math.prod(sizes)
            yield offsets, self.local[done : done + count].view(sizes)
            done += count


@dataclass(frozen=True, eq=False)
class Cut:
    """How a tensor is cut over the ranks of a group, of which rank `index` of `count` has its shares.

    shape: of the whole tensor
    dim: the dimension that is cut
    parts: sizes of stretches along `dim`, which fill it; a rank has share `index` of each of them
    group: the ranks that hold the other shares
    """

    shape: torch.Size
    dim: int
    parts: tuple[int, ...]
    index: int
    count: int
    group: ProcessGroup

    @property
    def local_shape(self) -> torch.Size:
        sizes = list(self.shape)
        sizes[self.dim] //= self.count
        return torch.Size(sizes)

    def shares(self) -> Iterator[tuple[int, int, int]]:
        """For each stretch: where this rank's share begins in the slice and in the whole, its length."""
        before = 0
        for part in self.parts:
            length = part // self.count
            yield before // self.count, before + self.index * length, length
            before += part


@dataclass(frozen=True, eq=False)
class Slice:
    """This rank's shares of a tensor that is cut along one dimension.

    local: of `cut.local_shape`, the shares one behind the other; a DTensor where data ranks cut it again
    """

    local: Tensor
    cut: Cut

    @property
    def dtype(self) -> torch.dtype:
        return self.local.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        return self.cut.shape

    def detach(self) -> "Slice":
        """The same memory, out of any graph."""
        return replace(self, local=self.local.detach())

    def clone(self) -> "Slice":
        """The same place with memory of its own."""
        return replace(self, local=self.local.clone())

    def boxes(self) -> Iterator[tuple[Offsets, Tensor]]:
        """Where each box of this slice begins in the whole tensor, and the box, a view.

        One box a stretch, at most.
        """
        held, dim = local_part(self.local), self.cut.dim
        begin = global_offset(self.local)
        for in_slice, in_whole, length in self.cut.shares():
            low = max(begin[dim], in_slice)
            high = min(begin[dim] + held.shape[dim], in_slice + length)
            if high > low or self.shape.numel() == 0:
                offsets = (*begin[:dim], in_whole + low - in_slice, *begin[dim + 1 :])
                yield offsets, held.narrow(dim, low - begin[dim], high - low)

    def whole(self) -> Tensor:
        """All of the tensor, on every rank; a collective over the data ranks and over `cut.group`."""
        slice_ = whole_tensor(self.local).detach().contiguous()
        others = [torch.empty_like(slice_) for _ in range(self.cut.count)]
        dist.all_gather(others, slice_, group=self.cut.group)
        sizes = [length for _, _, length in self.cut.shares()]
        shares = [other.split(sizes, self.cut.dim) for other in others]
        return torch.cat(
            [share for part in zip(*shares, strict=True) for share in part], self.cut.dim
        )


Held = Tensor | FlatPiece | Slice


def local_part(held: Held) -> Tensor:
    """This rank's own memory of a tensor, without its padding; may have no elements."""
    if isinstance(held, FlatPiece | Slice):
        return local_part(held.local)
    return held.to_local() if isinstance(held, DTensor) else held


def boxes_of(held: Held) -> Iterator[tuple[Offsets, Tensor]]:
    """The boxes of the whole tensor that this rank holds: where each begins, and a view of it."""
    if isinstance(held, FlatPiece | Slice):
        yield from held.boxes()
    else:
        yield global_offset(held), local_part(held)


def global_offset(tensor: Tensor) -> Offsets:
    """Where the local part begins in the whole tensor, one index a dimension."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(int(index) for index in offset)


def whole_tensor(held: Tensor | Slice) -> Tensor:
    """All of a tensor, on every rank; a collective where it is cut."""
    if isinstance(held, Slice):
        return held.whole()
    return held.full_tensor() if isinstance(held, DTensor) else held


def _boxes(shape: Offsets, begin: int, end: int) -> Iterator[tuple[Offsets, Offsets]]:
    """(offsets, sizes) of boxes that hold the elements from `begin` to before `end`, in order."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    if begin % row == 0 and end % row == 0:
        inner = (0,) * (len(shape) - 1)
        yield (begin // row, *inner), ((end - begin) // row, *shape[1:])
        return
    first, last = begin // row, (end - 1) // row
    if first == last:
        for offsets, sizes in _boxes(shape[1:], begin - first * row, end - first * row):
            yield (first, *offsets), (1, *sizes)
        return
    for start, stop in _rows(begin, end, row):
        yield from _boxes(shape, start, stop)


def _rows(begin: int, end: int, row: int) -> Iterator[tuple[int, int]]:
    """The rest of the first row, the whole rows after it, the beginning of the last."""
    low, high = -(-begin // row) * row, end // row * row
    yield from ((begin, low), (low, high), (high, end))
