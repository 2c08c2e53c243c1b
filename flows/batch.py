"""The record that travels from the data pipeline to the objective."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A few samples, or one microbatch of them.

    image: (batch, channels, height, width) float32 in [-1, 1]
    label: (batch,) int64 class of each sample
    position: (batch,) int64 place of each sample in the endless global stream: the key of all its
        randomness, the same whatever the number of ranks
    """

    image: Tensor
    label: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.position)

    def to(self, device: torch.device) -> "Batch":
        """The same samples on `device`; copies from pinned memory do not wait."""
        move = [t.to(device, non_blocking=True) for t in (self.image, self.label, self.position)]
        return Batch(*move)

    def split(self, size: int) -> Iterator["Batch"]:
        """Microbatches of at most `size` samples, in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield Batch(self.image[part], self.label[part], self.position[part])
