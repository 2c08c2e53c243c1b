"""Multi-head self-attention in which every token sees every token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.models.norms import RMSNorm
from flows.models.rotary import rotate


class QueryKeyValue(nn.Linear):
    """One projection to [queries | keys | values], of which the key bias never learns.

    A key bias adds the same number to all logits of a query, and softmax ignores it: its true
    gradient is zero. The computed one is rounding noise, which Adam would scale up to steps of full
    size, different on every layout. So the bias exists, as in published checkpoints, but its
    gradient is cut. Not for keys that are normalised or turned by their place: there a bias counts.
    """

    def __init__(self, width: int, key_width: int | None = None) -> None:
        """key_width: of keys and of values, where fewer heads share them; `width` unless given."""
        self.key_width = width if key_width is None else key_width
        super().__init__(width, width + 2 * self.key_width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width + 2 * key_width)."""
        sizes = (self.in_features, self.key_width, self.key_width)
        query, key, value = self.bias.split(sizes)
        return F.linear(x, self.weight, torch.cat((query, key.detach(), value)))


class Attention(nn.Module):
    """Softmax attention over all tokens, scaled by 1 / sqrt(width / heads).

    qk_norm: queries and keys of each head go through an RMS norm with a weight
    rope: they are turned by the place of their token, after the norm
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool = False, rope: bool = False
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width) if qk_norm or rope else QueryKeyValue(width)
        self.query_norm = RMSNorm(self.head_width) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_width) if qk_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width).

        turn: (2, tokens, head width / 2) of each token's place, see `flows.models.rotary.turns`
        """
        heads = self.qkv(x).unflatten(-1, (3, -1, self.head_width))
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        query, key = self.query_norm(query), self.key_norm(key)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return result
