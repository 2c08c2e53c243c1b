"""What a rank holds of a tensor: all of it, a DTensor, or a run of its elements as ZeRO cuts it.

ZeRO lays parameters end to end and cuts the line, so a rank's part begins and ends anywhere in a
parameter. No DTensor says that; `FlatPiece` does, and it knows which boxes of the whole tensor it
is made of, which is all that initial values, averages and checkpoints ask.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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


Held = Tensor | FlatPiece


def local_part(held: Held) -> Tensor:
    """This rank's own memory of a tensor, without its padding; may have no elements."""
    if isinstance(held, FlatPiece):
        return held.local
    return held.to_local() if isinstance(held, DTensor) else held


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
