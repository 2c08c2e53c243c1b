"""What DeepSpeed's optimizers hold, in the words of this project: names, pieces, gradients.

Stage 0 holds whole parameters. Stages 1 and 2 lay the parameters of an optimizer group end to end
and cut the line into as many parts as there are ranks; stage 3 cuts each parameter by itself and
lays its parts end to end. Either keeps the float32 weights that the optimizer moves in flat tensors,
beside the copies that the network computes with. This file alone knows DeepSpeed's own attributes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.pieces import FlatPiece, Held


class Holding(Protocol):
    """What one rank holds of the model and its optimizer.

    cut: whether gradients lie in different parts on different ranks
    device: where the optimizer is
    """

    cut: bool
    device: torch.device

    def parameters(self) -> Mapping[str, Held]: ...

    def optimizer_tensors(self) -> Mapping[str, Held]: ...

    def gradients(self) -> list[Tensor]:
        """Averaged over the ranks, this rank's part of them."""
        ...

    def step_on_zeros(self) -> None:
        """One step of the optimizer alone on gradients of zero."""
        ...

    def spread(self) -> None:
        """Bring the weights that `parameters` speaks of to the network; a collective."""
        ...


class Whole:
    """Stage 0."""

    cut = False

    def __init__(self, optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> None:
        self._optimizer, self._named = optimizer, named
        self.device = next(iter(named.values())).device

    def parameters(self) -> dict[str, Held]:
        return dict(self._named)

    def optimizer_tensors(self) -> dict[str, Held]:
        return {
            f"{name}.{slot}": value
            for name, parameter in self._named.items()
            for slot, value in self._optimizer.state[parameter].items()
        }

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self._named.values() if p.grad is not None]

    def step_on_zeros(self) -> None:
        for parameter in self._named.values():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def spread(self) -> None:
        """The network computes with the very weights that the optimizer moves."""


@dataclass(frozen=True)
class Place:
    """Where this rank's part of a parameter lies: `length` elements of flat tensor `flat` from
    `offset` on, which are those of the parameter from `start` on."""

    shape: torch.Size
    flat: int
    offset: int
    length: int
    start: int


class Cut:
    """Stages 1, 2 and 3. `zero` is the optimizer that DeepSpeed makes, `optimizer` the one inside."""

    cut = True

    def __init__(self, zero: Any, named: Mapping[str, nn.Parameter]) -> None:
        self._zero, self._optimizer = zero, zero.optimizer
        self._weights_are_cut = hasattr(zero, "fp32_partitioned_groups_flat")
        places = _places_of_cut_weights if self._weights_are_cut else _places_of_whole_weights
        self._places = places(zero, named)
        self.device = self._flats[0].device

    @property
    def _flats(self) -> list[Tensor]:
        zero = self._zero
        found: list[Tensor] = (
            zero.fp32_partitioned_groups_flat
            if self._weights_are_cut
            else zero.single_partition_of_fp32_groups
        )
        return found

    def parameters(self) -> dict[str, Held]:
        flats = [flat.detach() for flat in self._flats]
        return {name: _piece(flats[at.flat], at) for name, at in self._places.items()}

    def optimizer_tensors(self) -> dict[str, Held]:
        flats = self._flats
        return {
            f"{name}.{slot}": _piece(value, at) if value.dim() else value
            for name, at in self._places.items()
            for slot, value in self._optimizer.state[flats[at.flat]].items()
        }

    def gradients(self) -> list[Tensor]:
        flats = self._flats
        if flats[0].grad is not None:  # an optimizer on the host has them already
            return [flat.grad for flat in flats if flat.grad is not None]
        return [part for parts in self._zero.averaged_gradients.values() for part in parts]

    def step_on_zeros(self) -> None:
        for index, flat in enumerate(self._flats):
            kept = flat.grad
            flat.grad = torch.zeros_like(flat) if kept is None else kept.zero_()
            self._zero._optimizer_step(index)
            flat.grad = kept

    @torch.no_grad()
    def spread(self) -> None:
        zero = self._zero
        if not self._weights_are_cut:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for index in range(len(self._flats)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        # Small parameters stay whole on every rank.
        if kept := zero.persistent_parameters:
            kept[0].all_gather(kept)


def _places_of_whole_weights(zero: Any, named: Mapping[str, nn.Parameter]) -> dict[str, Place]:
    """Stages 1 and 2: each parameter knows its part of this rank's flat tensor, if it has one."""
    group_of = {id(p): group for group, members in enumerate(zero.bit16_groups) for p in members}
    found = {}
    for name, parameter in named.items():
        group, fragment = group_of[id(parameter)], parameter._hp_mapping  # type: ignore[attr-defined]
        offset = length = start = 0
        if fragment is not None:
            length, start = fragment.lp_fragment_address.numel, fragment.lp_fragment_address.start
            offset = fragment.hp_fragment_address.start
        found[name] = Place(parameter.shape, group, offset, length, start)
    return found


def _places_of_cut_weights(zero: Any, named: Mapping[str, nn.Parameter]) -> dict[str, Place]:
    """Stage 3: the ranks have equal parts of every parameter, the last ones padded."""
    found = {}
    for name, parameter in named.items():
        given: Any = parameter
        flat, offset, size = zero.grad_position[zero.get_param_id(parameter)]
        start = min(given.ds_zero_partition_rank * size, given.ds_numel)
        length = min(size, given.ds_numel - start)
        found[name] = Place(given.ds_shape, flat, offset, length, start)
    return found


def _piece(flat: Tensor, at: Place) -> FlatPiece:
    return FlatPiece(flat.narrow(0, at.offset, at.length), at.shape, at.start)
