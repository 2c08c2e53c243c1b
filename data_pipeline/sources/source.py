"""What can be packed into shards: a list of samples, each made when it is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Sample:
    """One sample of a shard.

    key: name without extension
    members: extension -> content
    """

    key: str
    members: Mapping[str, bytes]


class Source(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Sample: ...
