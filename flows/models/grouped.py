"""Matrix products of groups of rows, each with a matrix of its own, in one call.

An operator of its own around torch's, whose description for tensors without memory (tracing, `meta`)
knows bfloat16 alone in torch 2.13. Rows of all operands begin at multiples of 16 bytes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# Widths that are multiples of this are well aligned in bfloat16 too.
ALIGNMENT = 8


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows of `a` (rows, inner) times the matrix of their group in `b` (groups, inner, columns).

    ends: (groups,) int32 where the rows of each group end
    returns (rows, columns); differentiable
    """
    result: Tensor = _product(a, b, ends)
    return result


def autocast_device(tensor: Tensor) -> str:
    """The kind of device whose autocast a tensor is under; `meta` has none of its own."""
    return "cpu" if tensor.is_meta else tensor.device.type


def dtype_of_products(weight: Tensor) -> torch.dtype:
    """What a matrix product with `weight` is computed in: autocast does not know these products."""
    kind = autocast_device(weight)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Transposed rows of `a` (rows, n) times rows of `b` (rows, m), summed over each group: (groups, n, m).

    The gradient of the matrices of a `grouped_product`.
    """
    result: Tensor = _outer(a, b, ends)
    return result


@torch.library.custom_op("flowmill::grouped_product", mutates_args=())
def _product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=ends)


@_product.register_fake
def _(a: Tensor, b: Tensor, _ends: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.custom_op("flowmill::grouped_outer", mutates_args=())
def _outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(a.mT, b, offs=ends)


@_outer.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(ends.shape[0], a.shape[1], b.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], **_output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    a, b, ends = ctx.saved_tensors
    gradient = gradient.contiguous()
    return grouped_product(gradient, b.mT, ends), grouped_outer(a, gradient, ends), None


_product.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.flowmill.grouped_product)
def _operations_of_product(a: torch.Size, b: torch.Size, *_rest: Any, **_out: Any) -> int:
    rows, inner = a
    return 2 * rows * inner * b[2]


@register_flop_formula(torch.ops.flowmill.grouped_outer)
def _operations_of_outer(a: torch.Size, b: torch.Size, *_rest: Any, **_out: Any) -> int:
    rows, n = a
    return 2 * rows * n * b[1]


# As tracers and checkpoints of activations see it.
GROUPED_PRODUCT = torch.ops.flowmill.grouped_product.default
