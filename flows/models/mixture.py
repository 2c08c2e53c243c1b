"""A mixture of experts in the place of a feed-forward: y = sum over its experts p_e E_e(h), plus S(h).

Shazeer et al. 2017; experts and the shared network S are gated by SiLU and have no biases, as in
DiT-MoE (Fei et al. 2024), or experts are feed-forwards of a DiT, of which they can be made. Tokens are
brought into the order of their experts and all experts are computed by grouped matrix products, one call
for all whatever their loads.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flows.models.choice import Routing
from flows.models.feedforward import FeedForwardKind
from flows.models.grouped import dtype_of_products, grouped_outer, grouped_product
from flows.models.routers import Cell, Decision, Router

# (rows (slots, width), counts (experts,) of them) -> (slots, width): what experts do with their rows.
Compute = Callable[[Tensor, Tensor], Tensor]


# Work that needs no rows, to be done while they travel: of the network that computes every token.
Meanwhile = Callable[[], Tensor | None]
Exchange = Callable[[Compute, Tensor, Tensor, Meanwhile], tuple[Tensor, Tensor | None]]


def at_home(
    compute: Compute, rows: Tensor, counts: Tensor, meanwhile: Meanwhile
) -> tuple[Tensor, Tensor | None]:
    """`compute` where all experts are, and what `meanwhile` gives."""
    return compute(rows, counts), meanwhile()


class Experts(nn.Module):
    """E_e(h) = down_e(SiLU(gate) * value), (gate, value) the halves of up_e(h), for every expert e.

    Experts of the kind `gelu` are down_e(GELU(up_e(h))) with biases, as in `feedforward.FeedForward`.
    Weights are stacked with the expert first, which is how they are cut over ranks.

    count: of all experts, also where some of them are elsewhere
    exchange: brings rows to the experts and back, see `at_home`
    """

    def __init__(self, experts: int, width: int, hidden: int, kind: FeedForwardKind) -> None:
        super().__init__()
        self.count, self.kind = experts, kind
        self.exchange: Exchange = at_home
        inner = 2 * hidden if kind == "swiglu" else hidden
        self.up = nn.Parameter(torch.empty(experts, inner, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        if kind == "gelu":
            self.up_bias = nn.Parameter(torch.empty(experts, inner))
            self.down_bias = nn.Parameter(torch.empty(experts, width))

    def forward(
        self, rows: Tensor, counts: Tensor, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """rows (slots, width) in the order of the experts, counts (experts,) -> (slots, width).

        And what `meanwhile` gives.
        """
        compute = self._gated if self.kind == "swiglu" else self._with_biases
        return self.exchange(compute, rows.to(dtype_of_products(self.up)), counts, meanwhile)

    def _gated(self, rows: Tensor, counts: Tensor) -> Tensor:
        up, down = self.up.to(rows.dtype), self.down.to(rows.dtype)
        outputs: Tensor = _Gated.apply(rows, up, down, _ends(counts))
        return outputs

    def _with_biases(self, rows: Tensor, counts: Tensor) -> Tensor:
        up, down, up_bias, down_bias = (
            weight.to(rows.dtype) for weight in (self.up, self.down, self.up_bias, self.down_bias)
        )
        ends, count = _ends(counts), len(rows)
        hidden = grouped_product(rows, up.mT, ends)
        hidden = hidden + up_bias.repeat_interleave(counts, 0, output_size=count)
        inner = F.gelu(hidden, approximate="tanh")
        outputs = grouped_product(inner, down.mT, ends)
        return outputs + down_bias.repeat_interleave(counts, 0, output_size=count)


def _ends(counts: Tensor) -> Tensor:
    """Where the rows of each expert end, as grouped products take it."""
    return counts.cumsum(0).to(torch.int32)


class _Gated(torch.autograd.Function):
    """The gated networks of all experts, with gradients of weights that lie as the weights do.

    Autograd would lay them out as the transposed weights of the forward, to be copied once more.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
        hidden = grouped_product(rows, up.mT, ends)
        gate, value = hidden.chunk(2, dim=-1)
        opened = F.silu(gate)
        ctx.save_for_backward(rows, up, down, ends, hidden, opened)
        return grouped_product(opened * value, down.mT, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, up, down, ends, hidden, opened = ctx.saved_tensors
        gate, value = hidden.chunk(2, dim=-1)
        gradient = gradient.contiguous()
        of_inner = grouped_product(gradient, down, ends)
        of_gate = torch.ops.aten.silu_backward(of_inner * value, gate)
        of_hidden = torch.cat((of_gate, of_inner.mul_(opened)), dim=-1)
        wanted = ctx.needs_input_grad
        of_rows = grouped_product(of_hidden, up, ends) if wanted[0] else None
        of_up = grouped_outer(of_hidden, rows, ends) if wanted[1] else None
        of_down = grouped_outer(gradient, opened * value, ends) if wanted[2] else None
        return of_rows, of_up, of_down, None


class Shared(nn.Module):
    """The network that computes every token."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        gate, value = self.up(x).chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate) * value)
        return result


class Mixture(nn.Module):
    """Router, experts, and the shared network if `shared`, its hidden width, is above 0."""

    def __init__(
        self,
        width: int,
        hidden: int,
        shared: int,
        routing: Routing,
        kind: FeedForwardKind = "swiglu",
    ) -> None:
        super().__init__()
        self.router = Router(width, routing)
        self.experts = Experts(routing.experts, width, hidden, kind)
        self.shared = Shared(width, shared) if shared else None

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cell: Cell | None = None,
        mask: Tensor | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Decision]:
        """(batch, tokens, width) -> the same, and what the router said.

        The other arguments are the router's.
        """
        decision = self.router(x, state, cell, mask, before)
        slots = decision.slots
        rows = x.flatten(0, 1)
        sent = rows.index_select(0, slots.token)
        outputs, shared = self.experts(sent, slots.counts, partial(self._of_all, x))
        weighted = outputs * slots.weight.unsqueeze(1).to(outputs.dtype)
        mixed = weighted.new_zeros(len(rows), rows.shape[1]).index_add(0, slots.token, weighted)
        y = mixed.view_as(x)
        return y if shared is None else y + shared, decision

    def _of_all(self, x: Tensor) -> Tensor | None:
        return None if self.shared is None else self.shared(x)


def rows_of_experts(mixture: Mixture) -> list[str]:
    """Names of the mixture's parameters and buffers that have a row for each expert."""
    ours = mixture.state_dict()
    alike = ("router.inward.", "shared.")
    return [name for name in ours if not name.startswith(alike)]
