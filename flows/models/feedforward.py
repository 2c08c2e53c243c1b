"""The position-wise network of a transformer block."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from flows.models.division import Division, Linear

RATIO = 4

FeedForwardKind = Literal["gelu", "swiglu"]


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, linear; the hidden width is four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, RATIO * width)
        self.down = nn.Linear(RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        hidden = F.gelu(self.up(x), approximate="tanh")
        result: Tensor = self.down(hidden)
        return result

    def division(self) -> Division:
        return feedforward_division(self.down.in_features, up=1)


class GatedFeedForward(nn.Module):
    """down(SiLU(gate) * value) with (gate, value) the halves of up(x): SwiGLU (Shazeer 2020).

    The hidden width is 2/3 of four times the width, so that it costs as much as `FeedForward`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = gated_hidden(width)
        self.up = nn.Linear(width, 2 * hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        gate, value = self.up(x).chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate) * value)
        return result

    def division(self) -> Division:
        return feedforward_division(self.down.in_features, up=2)


class Projector(nn.Module):
    """Three layers with SiLU between them, from hidden states to the features of another encoder."""

    def __init__(self, width: int, hidden: int, features: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, features)."""
        result: Tensor = self.out(F.silu(self.middle(F.silu(self.up(x)))))
        return result


def feedforward_division(hidden: int, *, up: int) -> Division:
    """Of layers `up`, to so many runs of `hidden` features, and `down`."""
    return Division(
        layers={"up": Linear("column", (hidden,) * up), "down": Linear("row", (hidden,))},
        enters=("",),
        divisible={"hidden features": hidden},
    )


def gated_hidden(width: int) -> int:
    """Hidden width of a gated network, rounded down as LightningDiT does."""
    return 2 * RATIO * width // 3


def feedforward_of(kind: FeedForwardKind, width: int) -> nn.Module:
    """A feed-forward by its name in a recipe."""
    return FeedForward(width) if kind == "gelu" else GatedFeedForward(width)


def feedforward_products(kind: FeedForwardKind, width: int) -> int:
    """Multiply-adds of one token."""
    return 2 * RATIO * width**2 if kind == "gelu" else 3 * width * gated_hidden(width)
