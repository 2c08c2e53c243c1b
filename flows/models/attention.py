"""Multi-head self-attention in which every token sees every token."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.models.division import Division, Linear
from flows.models.norms import EPSILON, RMSNorm
from flows.models.rotary import rotate

# (queries, keys, values, mask) -> (batch, heads, tokens, head width), as `see_all` and `see_before`.
# Modules call theirs through an attribute, so that one who holds parts of sequences can replace it.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class QueryKeyValue(nn.Linear):
    """One projection to [queries | keys | values], of which the key bias never learns.

    A key bias adds the same number to all logits of a query, and softmax ignores it: its true
    gradient is zero. The computed one is rounding noise, which Adam would scale up to steps of full
    size, different on every layout. So the bias exists, as in published checkpoints, but its
    gradient is cut. Not for keys that are normalised, turned by their place or beside keys of another
    projection: there a bias counts.
    """

    def __init__(self, width: int, key_width: int | None = None, *, extra: int = 0) -> None:
        """key_width: of keys and of values, where fewer heads share them; `width` unless given.
        extra: further outputs, after the values
        """
        self.query_width = width
        self.key_width = width if key_width is None else key_width
        super().__init__(width, width + 2 * self.key_width + extra)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width + 2 * key_width + extra)."""
        return F.linear(x, self.weight, self.cut_bias())

    def cut_bias(self) -> Tensor:
        """The bias, through which no gradient reaches the keys' part."""
        rest = len(self.bias) - self.query_width - self.key_width
        query, key, others = self.bias.split((self.query_width, self.key_width, rest))
        return torch.cat((query, key.detach(), others))

    def division(self) -> Division:
        return Division(attributes=("query_width", "key_width"))


class Attention(nn.Module):
    """Softmax attention over all tokens, scaled by 1 / sqrt(width / heads).

    qk_norm: queries and keys of each head go through an RMS norm with a weight
    key_bias_learns: true where keys are normalised, turned or joined by others, see `QueryKeyValue`
    epsilon: of the norms of queries and keys
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool = False,
        key_bias_learns: bool = False,
        epsilon: float = EPSILON,
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width) if key_bias_learns else QueryKeyValue(width)
        self.query_norm = head_norm(self.head_width, exists=qk_norm, epsilon=epsilon)
        self.key_norm = head_norm(self.head_width, exists=qk_norm, epsilon=epsilon)
        self.out = nn.Linear(width, width)
        self.kernel: Kernel = see_all

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, tokens, width) -> queries, keys, values (batch, heads, tokens, head width)."""
        query, key, value = split_heads(self.qkv(x), self.head_width)
        return self.query_norm(query), self.key_norm(key), value

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width).

        turn: (2, tokens, head width / 2) of each token's place, see `flows.models.rotary.turns`
        """
        result: Tensor = self.out(attend(self.kernel, *self.heads(x), turn))
        return result

    def division(self) -> Division:
        width = self.out.out_features
        return Division(
            layers={"qkv": Linear("column", (width,) * 3), "out": Linear("row", (width,))},
            enters=("",),
            shared=("query_norm", "key_norm"),
            divisible={"heads": width // self.head_width},
        )


def head_norm(head_width: int, *, exists: bool, epsilon: float) -> nn.Module:
    """The RMS norm of the queries or the keys of each head, or none."""
    return RMSNorm(head_width, epsilon=epsilon) if exists else nn.Identity()


def split_heads(qkv: Tensor, head_width: int) -> tuple[Tensor, Tensor, Tensor]:
    """[queries | keys | values] (batch, tokens, 3 * width) -> (batch, heads, tokens, head_width) each."""
    query, key, value = qkv.unflatten(-1, (3, -1, head_width)).unbind(2)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def attend(
    kernel: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    turn: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Every query over all keys: (batch, heads, tokens, head width) -> (batch, tokens, width).

    kernel: `see_all`, or what stands for it
    turn: (2, tokens, head width / 2) turns queries and keys by their places
    mask: (batch, 1, 1, tokens) bool, false for keys that nobody sees
    """
    if turn is not None:
        query, key = rotate(query, turn), rotate(key, turn)
    return kernel(query, key, value, mask).transpose(1, 2).flatten(2)


def see_all(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of every query over all keys, scaled by 1 / sqrt(head width).

    query: (batch, heads, tokens, head width); returns the same shape
    key, value: (batch, kv_heads, tokens, head width), each head shared by heads / kv_heads queries
    mask: (batch, 1, 1, tokens) bool, false for keys that nobody sees
    """
    return _mix(query, key, value, attn_mask=mask)


def see_before(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As `see_all`, of query i over the keys 0 ... i; no key is masked."""
    assert mask is None, "a causal chain has no masked keys"
    return _mix(query, key, value, is_causal=True)


def _mix(query: Tensor, key: Tensor, value: Tensor, **seen: Any) -> Tensor:
    # A branch and no comparison as an argument, of which a compiler would make a symbol.
    if query.shape[1] != key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **seen)
    return F.scaled_dot_product_attention(query, key, value, **seen)
