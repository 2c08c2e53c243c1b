"""What routers of all layers did, as one tensor that travels with the tokens from layer to layer."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flows.routed import Routed


@dataclass(frozen=True)
class RoutingRecord:
    """The shape of such a tensor: (batch, layers x columns), of each layer what `Routed` has and the penalty.

    Where routers are traced, from the first layer on, whom the tokens asked for last follows, (batch,
    tokens x experts). The penalty alone has a graph.
    """

    layers: int
    experts: int
    traced: bool

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Columns of a layer: load, dropped, entropy, ties, flow, penalty."""
        return self.experts, 1, 1, 1, self.experts**2 if self.traced else 0, 1

    @property
    def _columns(self) -> int:
        return sum(self._sizes)

    def empty(self, tokens: Tensor) -> Tensor:
        """Before the first layer."""
        shape = len(tokens), self.layers * self._columns
        return tokens.new_zeros(shape, dtype=torch.float32)

    def asked_last(self, record: Tensor, tokens: int) -> Tensor | None:
        """(batch, tokens, experts) of the layer before, None where routers are not traced."""
        if not self.traced:
            return None
        asked = record[:, self.layers * self._columns :].detach()
        return asked.view(len(record), tokens, -1)

    def entered(
        self, record: Tensor, layer: int, routed: Routed, penalty: Tensor, asked: Tensor | None
    ) -> Tensor:
        """The record with what the router of a layer says, see `flows.models.routers.Decision`."""
        own = [value.reshape(len(record), -1) for value in (*routed, penalty)]
        before, rest = layer * self._columns, (self.layers - layer - 1) * self._columns
        last = [] if asked is None else [asked.flatten(1).float()]
        after = record[:, before + self._columns :][:, :rest]
        return torch.cat((record[:, :before], *own, after, *last), 1)

    def read(self, record: Tensor) -> tuple[Tensor, Routed]:
        """(batch,) penalties of all layers, and what their routers did."""
        layers = record[:, : self.layers * self._columns].unflatten(1, (self.layers, -1))
        load, *numbers, flow, _ = layers.detach().split(self._sizes, -1)
        dropped, entropy, ties = (number.squeeze(-1) for number in numbers)
        side = self.experts if self.traced else 0
        flow = flow.reshape(*load.shape[:2], side, side)
        return layers[..., -1].sum(1), Routed(load, dropped, entropy, ties, flow)
