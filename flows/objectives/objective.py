"""What an objective is: two pure functions around the network."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flows.batch import Batch
from flows.randomness import Draw


@dataclass(frozen=True)
class Prepared:
    """One microbatch made ready for the network.

    inputs: keyword arguments of the model's forward
    targets: what `loss` compares the model's output with
    time: (batch,) flow time of each sample, for reports of the loss by noise level; None if it has none
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Tensor]
    time: Tensor | None


class Objective(Protocol):
    """`prepare` draws all randomness by sample key; `loss` is deterministic."""

    def prepare(self, batch: Batch, draw: Draw) -> Prepared: ...

    def loss(self, outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """(batch,) loss of each sample, in float32."""
        ...
