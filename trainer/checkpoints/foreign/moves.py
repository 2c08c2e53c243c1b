"""Moves of tensors between a published program's names and ours, which lose no bit either way.

A format is a list of moves. Read forwards they import a state dictionary, backwards they export one;
run on the meta device, backwards, they say which names and shapes a file of the format has.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]
Transform = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Move:
    """A few tensors of theirs and the few of ours that hold the same numbers.

    come: their tensors, in the order of `theirs` -> ours, in the order of `ours`
    go: the inverse
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    come: Transform
    go: Transform


def same(theirs: str, ours: str) -> Move:
    """One tensor under two names."""
    return Move((theirs,), (ours,), list, list)


def linear(theirs: str, ours: str, *, bias: bool = True) -> list[Move]:
    """Weight and bias of one layer, under two names."""
    parts = ("weight", "bias") if bias else ("weight",)
    return [same(f"{theirs}.{part}", f"{ours}.{part}") for part in parts]


def changed(
    theirs: str, ours: str, come: Callable[[Tensor], Tensor], go: Callable[[Tensor], Tensor]
) -> Move:
    """One tensor of theirs that a function makes ours, and another one back."""
    return Move((theirs,), (ours,), lambda t: [come(t[0])], lambda t: [go(t[0])])


def turned_back(theirs: str, ours: str, function: Callable[[Tensor], Tensor]) -> Move:
    """One tensor changed by a function that is its own inverse."""
    return changed(theirs, ours, function, function)


def stacked(theirs: str, ours: Sequence[str], each: Move) -> Move:
    """Tensors of ours along a leading axis of one of theirs, each of them changed as `each` says."""
    return Move(
        (theirs,),
        tuple(ours),
        lambda t: [each.come([row])[0] for row in t[0]],
        lambda t: [torch.stack([each.go([one])[0] for one in t])],
    )


def kernel(theirs: str, ours: str, patch: int) -> Move:
    """A convolution kernel (width, channels, patch, patch) as the matrix that acts on patches.

    The features of our patches are ordered (row, column, channel).
    """

    def go(weight: Tensor) -> Tensor:
        channels = weight.shape[1] // patch**2
        return weight.reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)

    return changed(theirs, ours, lambda k: k.permute(0, 2, 3, 1).flatten(1), go)


def to_ours(moves: Iterable[Move], state: Mapping[str, Tensor]) -> State:
    """A state dictionary under our names. Every name that a move asks for must be there."""
    return _moved([(move.theirs, move.ours, move.come) for move in moves], state)


def to_theirs(moves: Iterable[Move], state: Mapping[str, Tensor]) -> State:
    """A state dictionary under their names."""
    return _moved([(move.ours, move.theirs, move.go) for move in moves], state)


def _moved(
    moves: Iterable[tuple[tuple[str, ...], tuple[str, ...], Transform]], state: Mapping[str, Tensor]
) -> State:
    """Contiguous, and no two of them share memory, as a file of tensors wants them."""
    moved: State = {}
    for before, after, function in moves:
        values = function([state[name] for name in before])
        for name, value in zip(after, values, strict=True):
            moved[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return moved
