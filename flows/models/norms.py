"""Normalisation without weights of its own, modulated by a condition (adaptive norm)."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
