"""Normalisations, and how a condition modulates them (adaptive norm)."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6
DYT_ALPHA = 0.5  # where the slope of a fresh DyT starts

NormKind = Literal["layer", "rms", "dyt"]


def layer_norm(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the last dimension; same shape and dtype as `x`.

    PyTorch's kernels take the statistics of half-precision inputs in float32, so nothing is cast.
    """
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


class Modulation(NamedTuple):
    """What a condition does to one layer and its residual, (batch, 1, width) each."""

    shift: Tensor | None
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """shift + x * (1 + scale), without a shift where it is None.

    x: (batch, tokens, width)
    shift, scale: (batch, 1, width)
    """
    return x * (scale + 1) if shift is None else torch.addcmul(shift, x, scale + 1)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """shift + layer_norm(x) * (1 + scale).

    x: (batch, tokens, width)
    shift, scale: (batch, 1, width)
    """
    return modulate(layer_norm(x), shift, scale)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update in one kernel.

    x, update: (batch, tokens, width)
    gate: (batch, 1, width)
    """
    return torch.addcmul(x, gate, update)


class LayerNorm(nn.Module):
    """`layer_norm`, times a weight and plus a bias if it is affine (Ba et al. 2016)."""

    def __init__(self, width: int, *, affine: bool) -> None:
        super().__init__()
        self.affine = affine
        if affine:
            self.weight = nn.Parameter(torch.empty(width))
            self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the dtype of `x`."""
        if not self.affine:
            return layer_norm(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + weight) over the last dimension; statistics in float32.

    Zhang and Sennrich 2019. With `offset` 1 the weight is stored as its distance from 1 and starts
    at 0, as in STARFlow; with `offset` 0 it starts at 1. If it is not `affine` there is no weight.
    """

    def __init__(
        self, width: int, *, epsilon: float = EPSILON, offset: float = 0.0, affine: bool = True
    ) -> None:
        super().__init__()
        self.epsilon, self.offset, self.affine = epsilon, offset, affine
        if affine:
            self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the dtype of `x`."""
        # Rounded first, so that a weight gathered in bfloat16 and one cast here are the same.
        weight = self.weight.to(x.dtype).float() + self.offset if self.affine else None
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.epsilon).to(x.dtype)


class DynamicTanh(nn.Module):
    """weight * tanh(alpha x) + bias in the place of a norm; without weight and bias if not `affine`.

    Zhu et al. 2025, "Transformers without Normalization", eq. 1. It takes no statistics: nothing is
    summed over features, so that no cut of the width changes a bit. `alpha` starts at DYT_ALPHA.
    """

    def __init__(self, width: int, *, affine: bool = True) -> None:
        super().__init__()
        self.affine = affine
        self.alpha = nn.Parameter(torch.empty(1))
        if affine:
            self.weight = nn.Parameter(torch.empty(width))
            self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the dtype of `x`."""
        squashed = torch.tanh(x * self.alpha.to(x.dtype))
        if not self.affine:
            return squashed
        return torch.addcmul(self.bias.to(x.dtype), squashed, self.weight.to(x.dtype))


def norm_of(kind: NormKind, width: int, *, affine: bool) -> nn.Module:
    """A norm of tokens (..., width) by its name in a recipe."""
    if kind == "layer":
        return LayerNorm(width, affine=affine)
    return RMSNorm(width, affine=affine) if kind == "rms" else DynamicTanh(width, affine=affine)
