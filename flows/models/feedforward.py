"""The position-wise network of a transformer block."""

import torch.nn.functional as F
from torch import Tensor, nn

RATIO = 4


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
