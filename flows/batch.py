"""The record that travels from the data pipeline to the objective."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A few samples, or one microbatch of them.

    image: (batch, channels, height, width) float32 in [-1, 1]
    label: (batch,) int64 class of each sample
    position: (batch,) int64 place of each sample in the endless global stream: the key of all its
        randomness, the same whatever the number of ranks
    extras: name -> (batch, ...) whatever else belongs to a sample, such as `text`, the embedded
        words of its caption (batch, tokens, width), or what an objective made of the global batch
    """

    image: Tensor
    label: Tensor
    position: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.position)

    def to(self, device: torch.device) -> "Batch":
        """The same samples on `device`; copies from pinned memory do not wait."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        extras = {name: move(value) for name, value in self.extras.items()}
        return Batch(move(self.image), move(self.label), move(self.position), extras)

    def take(self, rows: slice | Tensor) -> "Batch":
        """Some of the samples: a slice, or (n,) int64 indices."""
        extras = {name: value[rows] for name, value in self.extras.items()}
        return Batch(self.image[rows], self.label[rows], self.position[rows], extras)

    def split(self, size: int) -> Iterator["Batch"]:
        """Microbatches of at most `size` samples, in order."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))
