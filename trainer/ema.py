"""Exponential moving averages of the weights, cut over the ranks as the weights are.

Several decays live side by side. An update reads and writes local shards alone: no communication,
no wait for the device.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from parallel.pieces import Held, local_part


def decay_at(decay: float, step: int) -> float:
    """The decay in force at optimizer step `step` (from 0): short memory first, `decay` in the
    end.

    min(decay, (1 + step) / (10 + step)), so that the random first weights are soon forgotten.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Averages of named float32 parameters, one set for each decay, placed like the parameters."""

    def __init__(self, parameters: Mapping[str, Held], decays: Sequence[float]) -> None:
        """Begin every average at the parameters as they are now."""
        for name, parameter in parameters.items():
            if parameter.dtype != torch.float32:
                raise ValueError(f"average of {name} in {parameter.dtype}: an EMA needs float32")
        self.averages = {
            decay: {name: parameter.detach().clone() for name, parameter in parameters.items()}
            for decay in decays
        }
        self._applied = False

    def tensors(self) -> dict[str, Held]:
        """`<decay>.<name>` -> average, for checkpoints; loading writes in place."""
        self._refuse_while_applied()
        return {
            f"{decay}.{name}": average
            for decay, averages in self.averages.items()
            for name, average in averages.items()
        }

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Held], skip: Tensor, step: int) -> None:
        """e <- e + (1 - d) (1 - skip) (p - e) for every decay d, as in force at `step`.

        skip: () 1 where the optimizer step was skipped, else 0; on the parameters' device
        """
        self._refuse_while_applied()
        for decay, averages in self.averages.items():
            if averages:
                weight = (1.0 - skip.float()) * (1.0 - decay_at(decay, step))
                targets = [local_part(average) for average in averages.values()]
                sources = [local_part(parameters[name]) for name in averages]
                # An optimizer on the host keeps its weights there, and their averages with them.
                weight = weight.to(targets[0].device)
                torch._foreach_lerp_(targets, sources, [weight] * len(targets))

    @contextmanager
    def applied(self, parameters: Mapping[str, Held], decay: float) -> Iterator[None]:
        """Within, `parameters` hold the average of `decay` and the average holds the parameters.

        Local data change places in place, with memory for one tensor; they change back at the
        end, whatever happens within. Checkpoints and updates are refused meanwhile.
        """
        self._refuse_while_applied()
        exchanged: list[tuple[Held, Held]] = []
        self._applied = True
        try:
            for name, average in self.averages[decay].items():
                _exchange(parameters[name], average)
                exchanged.append((parameters[name], average))
            yield
        finally:
            for parameter, average in exchanged:
                _exchange(parameter, average)
            self._applied = False

    def _refuse_while_applied(self) -> None:
        if self._applied:
            raise RuntimeError("the averages are in the parameters' place: leave `applied` first")


@torch.no_grad()
def _exchange(first: Held, second: Held) -> None:
    one, other = local_part(first), local_part(second)
    held = one.clone()
    one.copy_(other)
    other.copy_(held)
