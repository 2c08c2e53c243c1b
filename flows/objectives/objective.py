"""What an objective is: two pure functions around the network, and one around the global batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

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


# (batch, whole, seed, step) -> batch with what the samples of the global batch `whole` make of each
# other in its extras. `whole` holds image, label and position of all samples of the step in the order
# of their positions, whichever rank has them, so that no layout changes a pairing.
Couple = Callable[[Batch, Batch, int, int], Batch]


class Objective(Protocol):
    """`prepare` draws all randomness by sample key; `loss` is deterministic.

    couple: for objectives whose samples depend on each other; None where they do not
    """

    @property
    def couple(self) -> Couple | None: ...

    def prepare(self, batch: Batch, draw: Draw) -> Prepared: ...

    def loss(self, outputs: Any, targets: dict[str, Tensor]) -> Tensor:
        """(batch,) loss of each sample, in float32."""
        ...
