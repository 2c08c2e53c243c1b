"""What the published networks share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def dense(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def plain_norm(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """A layer norm without weights."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()


def rms_norm(x: Tensor, gain: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * gain


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """(batch, heads, tokens, features); mask: True where a query sees a key."""
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ value


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(batch, tokens, heads * features) -> (batch, heads, tokens, features)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def turn_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Features 2i and 2i + 1 turn by angles[token, i]."""
    a, b = x[..., 0::2], x[..., 1::2]
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.stack(turned, dim=-1).flatten(-2)


def frequencies(count: int, base: float = 10_000.0) -> Tensor:
    return base ** (-torch.arange(count) / count)


def sinusoid(t: Tensor, features: int = 256) -> Tensor:
    """[cosines | sines] of t at half as many frequencies."""
    angle = t[:, None] * frequencies(features // 2)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def random_state(shapes: dict[str, tuple[int, ...]], seed: int, scale: float = 0.3) -> State:
    """A state dictionary of random weights, large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        * (scale / math.sqrt(shape[-1]) if len(shape) > 1 else scale)
        for name, shape in shapes.items()
    }
