"""Routers of a mixture of experts: the scores that choices are made of, and what balance costs.

Everything here is a function of one sample and of the state that the last step left, so that no split of a
batch changes it (docs/decisions/0007).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flows.models.choice import Routing, Slots, distribution, experts_choose, tokens_choose
from flows.models.grouped import autocast_device, dtype_of_products
from flows.routed import Routed

GRAINS = 2.0**40


class Cell(NamedTuple):
    """The weights of a gated recurrent unit, as `torch.nn.GRUCell` has them: reset, update, new.

    inward, onward: (3 * width, width) of the input and of the state
    inward_bias, onward_bias: (3 * width,)
    """

    inward: Tensor
    onward: Tensor
    inward_bias: Tensor
    onward_bias: Tensor


class RouterCell(nn.Module):
    """The recurrent unit that the routers of all layers share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward = nn.Parameter(torch.empty(3 * width, width))
        self.onward = nn.Parameter(torch.empty(3 * width, width))
        self.inward_bias = nn.Parameter(torch.empty(3 * width))
        self.onward_bias = nn.Parameter(torch.empty(3 * width))

    def weights(self) -> Cell:
        """In float32. Blocks are handed these: parts that are cut apart cannot share a module."""
        weights = (self.inward, self.onward, self.inward_bias, self.onward_bias)
        return Cell(*(rounded(weight) for weight in weights))


class Reach(NamedTuple):
    """How what is known of a router's tokens becomes what is known of all tokens of their samples.

    mean: of a mean (batch, ...) over tokens, differentiable; total: of a sum over tokens
    """

    mean: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


def _as_it_is(value: Tensor) -> Tensor:
    return value


# Where a router sees all tokens of its samples.
ALL_TOKENS = Reach(_as_it_is, _as_it_is)


class Decision(NamedTuple):
    """What a router says of a batch.

    penalty: (batch,) float32 weighted losses
    state: (batch, tokens, recurrent) for the next layer's router, if there is one
    asked: (batch, tokens, experts) bool who asked for whom, for the next layer's router where it is traced
    """

    slots: Slots
    penalty: Tensor
    routed: Routed
    state: Tensor | None
    asked: Tensor | None


class Router(nn.Module):
    """Logits, scores, choice. Computed in float32 whatever the precision.

    share: buffer (experts,) shares of the slots in the last step, see `Routing.balance`
    bias: buffer (experts,) added to scores for the choice alone, see `Routing.bias_rate`
    reach: from its tokens to all of a sample
    traced: whether it counts from which experts of the layer before its tokens come
    """

    share: Tensor | None
    bias: Tensor | None

    def __init__(self, width: int, routing: Routing) -> None:
        super().__init__()
        self.routing, self.reach, self.traced = routing, ALL_TOKENS, False
        experts, recurrent = routing.experts, routing.recurrent
        self.inward = nn.Linear(width, recurrent, bias=False) if recurrent else None
        self.gate = nn.Linear(recurrent or width, experts, bias=False)
        self.register_buffer("share", _numbers(experts, exist=routing.balance == "previous"))
        self.register_buffer("bias", _numbers(experts, exist=routing.bias_rate > 0))

    def reset_buffers(self) -> None:
        """As before the first step: equal shares, no bias."""
        if self.share is not None:
            self.share.fill_(1.0 / self.routing.experts)
        if self.bias is not None:
            self.bias.zero_()

    def forward(
        self,
        x: Tensor,
        state: Tensor | None = None,
        cell: Cell | None = None,
        mask: Tensor | None = None,
        before: Tensor | None = None,
    ) -> Decision:
        """x (batch, tokens, width) -> who computes what.

        state: (batch, tokens, recurrent) of the layer before, None at the first
        cell: given where the router is recurrent
        mask: (batch, tokens, slots of a token) float32 that the weights are multiplied with: `chosen`
            slots, or one for each expert where experts choose
        before: `Decision.asked` of the layer before, None at the first
        """
        routing, gate = self.routing, rounded(self.gate.weight)
        inward = rounded(self.inward.weight) if self.inward is not None else None
        with torch.autocast(autocast_device(x), enabled=False):
            hidden = x.float()
            if inward is not None:
                if cell is None:
                    raise ValueError("a recurrent router is called with the cell of all layers")
                hidden = state = gated_unit(F.linear(hidden, inward), state, cell)
            logits = F.linear(hidden, gate)
            scores = softmax(logits) if routing.gate == "softmax" else logits.sigmoid()
            if routing.chooser == "experts":
                slots, routed, asked = experts_choose(scores, routing, mask)
            else:
                slots, routed, asked = tokens_choose(scores, self.bias, routing, mask)
            if self.traced:
                routed = routed._replace(flow=_flow(before, asked))
            routed = self._of_all_tokens(routed)
            penalty = self._penalty(logits, scores, routed.load)
            return Decision(slots, penalty, routed, state, asked if self.traced else None)

    def _of_all_tokens(self, own: Routed) -> Routed:
        """Sums in one message, where there are others to tell."""
        parts = own.load, own.dropped[:, None], own.ties[:, None], own.flow.flatten(1)
        counted = self.reach.total(torch.cat(parts, 1))
        load, dropped, ties, flow = counted.split([part.shape[1] for part in parts], 1)
        entropy = self.reach.mean(own.entropy)
        return Routed(load, dropped[:, 0], entropy, ties[:, 0], flow.view_as(own.flow))

    def _penalty(self, logits: Tensor, scores: Tensor, load: Tensor) -> Tensor:
        """(batch,) balance and z losses of each sample."""
        routing = self.routing
        penalty = logits.new_zeros(len(logits))
        if routing.balance != "none":
            shares = _shares(load) if self.share is None else self.share
            mean = self.reach.mean(distribution(scores).mean(1))
            penalty = penalty + routing.balance_weight * routing.experts * (mean * shares).sum(-1)
        if routing.z_weight:
            square = logits.logsumexp(-1).square().mean(-1)
            penalty = penalty + routing.z_weight * self.reach.mean(square)
        return penalty


def gated_unit(x: Tensor, state: Tensor | None, cell: Cell) -> Tensor:
    """The next state (..., width) of a gated recurrent unit (Cho et al. 2014); None: a state of zeros."""
    before = torch.zeros_like(x) if state is None else state
    inward = F.linear(x, cell.inward, cell.inward_bias).chunk(3, -1)
    onward = F.linear(before, cell.onward, cell.onward_bias).chunk(3, -1)
    reset, update = (torch.sigmoid(i + o) for i, o in zip(inward[:2], onward[:2], strict=True))
    new = torch.tanh(inward[2] + reset * onward[2])
    return torch.lerp(new, before, update)


def softmax(logits: Tensor) -> Tensor:
    """Over the last dimension of float32 logits; experts in another order have the same bits.

    Powers are added up in whole multiples of 1 / GRAINS, which float64 adds without rounding.
    """
    scores: Tensor = _Softmax.apply(logits)
    return scores


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        powers = (logits - logits.amax(-1, keepdim=True)).exp_()
        total = powers.double().mul_(GRAINS).round_().sum(-1, keepdim=True).div_(GRAINS)
        scores = powers.div_(total.to(powers.dtype))
        ctx.save_for_backward(scores)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (scores,) = ctx.saved_tensors
        scaled = gradient * scores
        result: Tensor = scaled - scores * scaled.sum(-1, keepdim=True)
        return result


def rounded(weight: Tensor) -> Tensor:
    """A weight in float32, of the same bits whether it was gathered in bfloat16 or is rounded here."""
    return weight.to(dtype_of_products(weight)).float()


def routers_of(model: nn.Module) -> list[Router]:
    """All routers of a network, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def routing_shape(model: nn.Module) -> tuple[int, int] | None:
    """(layers with experts, experts of each); None for a network without experts."""
    found = routers_of(model)
    return (len(found), found[0].routing.experts) if found else None


def drop_nothing(model: nn.Module) -> None:
    """Let tokens find a place wherever they ask, in place: then no layer's work hangs on what they ask."""
    for router in routers_of(model):
        if router.routing.chooser == "tokens":
            router.routing = replace(router.routing, capacity=0.0)


def is_traced(model: nn.Module) -> bool:
    """Whether the routers of a network count from which experts their tokens come."""
    return any(router.traced for router in routers_of(model))


def trace_flow(model: nn.Module) -> None:
    """Let all routers of a network count from which experts their tokens come, in place."""
    for router in routers_of(model):
        router.traced = True


@torch.no_grad()
def rebalance(routers: Iterable[Router], load: Tensor, skip: Tensor) -> None:
    """What routers carry from a step to the next, of the load of the whole batch. In place.

    load: (layers, experts) slots that asked for each expert, over all samples of the step
    skip: () 1 where the optimizer step was skipped: then nothing changes

    A bias moves by `bias_rate` towards the experts that had less than the mean; all together do not
    move, for a common shift changes no choice.
    """
    took = 1.0 - skip.to(load.dtype)
    for router, slots in zip(routers, load, strict=True):
        if router.share is not None:
            router.share.lerp_(slots / slots.sum(), took)
        if router.bias is not None:
            move = router.routing.bias_rate * torch.sign(slots.mean() - slots)
            router.bias.add_(took * (move - move.mean()))


def _numbers(count: int, *, exist: bool) -> Tensor | None:
    return torch.empty(count) if exist else None


def _flow(before: Tensor | None, asked: Tensor) -> Tensor:
    """(batch, experts, experts) `Routed.flow`; products of zeros and ones, which are exact."""
    here = asked.float()
    there = torch.zeros_like(here) if before is None else before.float()
    return there.transpose(1, 2) @ here


def _shares(load: Tensor) -> Tensor:
    return load / load.sum(-1, keepdim=True)
