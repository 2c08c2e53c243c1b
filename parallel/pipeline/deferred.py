"""A backward in two halves: gradients of weights are kept back until they are asked for.

Zero-bubble schedules (Qi et al., Zero Bubble Pipeline Parallelism, 2024) send a stage's input gradient on
and fill waits with the gradients of its weights. The matrix products of linear layers are what is kept
back, most of that work; gradients of norms, tables and biases are cheap and come with the input's. (The
split of the autograd graph in torch 2.13 fails where a block's condition reaches it twice, as adaptive
norms do.)
"""

from collections.abc import Callable, Container
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from flows.models.attention import QueryKeyValue

KeepBack = Callable[[Callable[[], None]], None]


@runtime_checkable
class KeepsBack(Protocol):
    """A module that divides its backward itself."""

    def keep_back(self, keep: KeepBack) -> None:
        """From now on give `keep` what can wait, instead of doing it in the backward."""


class Deferred:
    """What the backwards of one stage have kept back since it was last taken."""

    def __init__(self, module: nn.Module, undivided: Container[nn.Module] = ()) -> None:
        """Divide the backward of `module`, whose linear layers are changed in place but for `undivided`."""
        self._kept: list[Callable[[], None]] = []
        for part in module.modules():
            if part in undivided:
                continue
            if isinstance(part, KeepsBack):
                part.keep_back(self._kept.append)
            elif type(part) is nn.Linear or isinstance(part, QueryKeyValue):
                part.forward = partial(_linear, part, self._kept.append)  # type: ignore[method-assign]

    def take(self) -> Callable[[], None]:
        """What does all that was kept back, when it is called."""
        kept = list(self._kept)
        self.forget()

        def finish() -> None:
            for work in kept:
                work()

        return finish

    def forget(self) -> None:
        self._kept.clear()


def _linear(layer: nn.Linear, keep: KeepBack, x: Tensor) -> Tensor:
    bias = layer.cut_bias() if isinstance(layer, QueryKeyValue) else layer.bias
    result: Tensor = _Linear.apply(x, layer.weight, bias, keep)
    return result


class _Linear(Function):
    """y = x W^T + b, in whatever precision the matrix product of the forward has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, keep: KeepBack) -> Tensor:
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x.to(y.dtype), weight)
        # The very parameter, for FSDP may have put a shard in the layer by the time of its gradient.
        ctx.weight, ctx.keep = weight, keep
        ctx.types = x.dtype, bias if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x = for_bias = None
        if ctx.needs_input_grad[0]:
            for_x = (gradient @ weight.to(gradient.dtype)).to(ctx.types[0])
        if ctx.needs_input_grad[2]:
            for_bias = gradient.flatten(0, -2).sum(dim=0).to(ctx.types[1])
        if ctx.needs_input_grad[1]:
            ctx.keep(partial(_add_product, ctx.weight, gradient, x))
        return for_x, None, for_bias, None


def _add_product(weight: Tensor, gradient: Tensor, x: Tensor) -> None:
    """The weight's gradient, added to what it has."""
    product = (gradient.flatten(0, -2).t() @ x.flatten(0, -2)).to(weight.dtype)
    if weight.grad is None:
        weight.grad = product
    else:
        weight.grad += product
