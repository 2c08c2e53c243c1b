"""A model's forward as a row of links: what can be cut between any two of them. Nothing here cuts.

A stream of tensors goes from link to link, and every link is told the same about the samples. What is
told is computed from the batch, wherever it is needed, and does not travel with the stream.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

Stream = tuple[Tensor, ...]
Told = Mapping[str, Any]


@dataclass(frozen=True)
class Link:
    """The smallest piece of a model that a part of it may consist of.

    name: for people
    holds: the beginnings of the names of the parameters that it alone uses
    run: stream, told -> stream
    """

    name: str
    holds: tuple[str, ...]
    run: Callable[[Stream, Told], Stream]


@dataclass(frozen=True)
class Chain:
    """All links of a model, in the order of its forward.

    tell: the model's inputs but for `x`, by name, and the number of samples -> what links are told
    tells: the beginnings of the names of the parameters that `tell` uses
    end: the last stream -> what the model's forward returns
    borders: places before links where a repeated part begins, a flow block say; the coarse places to cut
    """

    links: tuple[Link, ...]
    tell: Callable[[Mapping[str, Tensor], int], Told]
    tells: tuple[str, ...]
    end: Callable[[Stream], Any]
    borders: tuple[int, ...]

    def run(self, x: Tensor, inputs: Mapping[str, Tensor]) -> Any:
        """The model's forward, link by link."""
        told, stream = self.tell(inputs, len(x)), cast(Stream, (x,))
        for link in self.links:
            stream = link.run(stream, told)
        return self.end(stream)


class Chained(Protocol):
    """A model that says how its forward may be cut."""

    def chain(self) -> Chain: ...
