"""Normalisations, and how a condition modulates them (adaptive norm)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6


def layer_norm(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the last dimension; same shape and dtype as `x`.

    PyTorch's kernels take the statistics of half-precision inputs in float32, so nothing is cast.
    """
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """shift + layer_norm(x) * (1 + scale).

    x: (batch, tokens, width)
    shift, scale: (batch, 1, width)
    """
    return torch.addcmul(shift, layer_norm(x), scale + 1)


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
    at 0, as in STARFlow; with `offset` 0 it starts at 1.
    """

    def __init__(self, width: int, *, epsilon: float = EPSILON, offset: float = 0.0) -> None:
        super().__init__()
        self.epsilon, self.offset = epsilon, offset
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the dtype of `x`."""
        weight = self.weight.float() + self.offset
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.epsilon).to(x.dtype)


class DynamicTanh(nn.Module):
    """weight * tanh(alpha x) + bias, in the place of a norm (Zhu et al. 2025, eq. 1).

    It takes no statistics, so it needs no sum over the width. `alpha` starts at 1/2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return torch.addcmul(self.bias, self.weight, torch.tanh(self.alpha * x))
