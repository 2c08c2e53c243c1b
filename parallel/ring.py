"""Ring attention: keys and values go round the ranks of a sequence, queries stay where they are.

Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context"; exact. A rank
holds queries, keys and values of its own tokens. In n turns it sees the keys of all n ranks, one rank's
at a time, and joins what they give by their logsumexps. The next keys travel while these are used.

Bidirectional: rank r holds the r-th of n equal runs of tokens. Causal: a rank with the first run would
have nothing to do and one with the last everything, so the sequence is cut into 2 n chunks, of which
rank r holds r and 2 n - 1 - r ("zigzag"). In each turn but its own a rank then computes half of its
square: all queries over the first chunk of an earlier rank, or its second chunk's queries over all keys
of a later one. The order is its own mirror image: the rank of token i is the rank of token N - 1 - i.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from parallel.attention_parts import Part, attend_part, join_, part_gradients
from parallel.exchange import Travelling, gather_mask, in_dtype_of_products, named_group, send_on


def zigzag(tokens: int, rank: int, size: int) -> Tensor:
    """(tokens / size,) places in the sequence of the tokens that a rank holds, in its order.

    tokens: of the whole sequence, divisible by 2 * size
    """
    chunks = torch.arange(tokens).view(2 * size, -1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def zigzag_order(tokens: int, size: int) -> Tensor:
    """(tokens,) places of all tokens, rank after rank: what a gather of the parts is in order of."""
    return torch.cat([zigzag(tokens, rank, size) for rank in range(size)])


def inverse(order: Tensor) -> Tensor:
    """The order that undoes `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def seen(rank: int, source: int, tokens: int, *, causal: bool) -> tuple[slice, slice, bool]:
    """Which queries of `rank` see which keys of `source`, and whether only those up to their own.

    tokens: that each rank holds
    """
    every, half = slice(0, tokens), tokens // 2
    if not causal or source == rank:
        return every, every, causal
    if source < rank:
        return every, slice(0, half), False
    return slice(half, tokens), every, False


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    group: ProcessGroup,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of `group`; a collective.

    query: (batch, heads, local tokens, head width); returns the same shape
    key, value: (batch, kv_heads, local tokens, head width), each head shared by heads / kv_heads queries
    mask: (batch, 1, 1, local tokens) bool, false for keys that nobody sees
    causal: tokens lie in zigzag order, and a query sees those up to its own
    """
    query, key, value = in_dtype_of_products(query, key, value)
    out: Tensor = _attend(query, key, value, mask, causal, group.group_name)[0]
    return out


def ring_bytes(keys: int, element: int, size: int) -> int:
    """What a rank sends in a step for one attention that is not recomputed, in bytes.

    Keys and values go round once forward and once backward; their gradients, in float32, go all the
    way home.

    keys: numbers in the keys of one rank, batch * kv_heads * local tokens * head width
    element: bytes of each
    """
    return 2 * keys * (2 * element * (size - 1) + 4 * size)


@torch.library.custom_op("flowmill::ring_attention", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, group_name: str
) -> tuple[Tensor, Tensor]:
    """(out, lse) of all keys; one operator, which a compiler need not look into."""
    group = named_group(group_name)
    rank, size, tokens = dist.get_rank(group), dist.get_world_size(group), query.shape[2]
    masks = _masks(mask, group)
    out = _by_tokens(query).zero_()
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    held = torch.stack((key, value))
    for turn in range(size):
        source = (rank - turn) % size
        following = send_on(held, group) if turn < size - 1 else None
        queries, keys, triangle = seen(rank, source, tokens, causal=causal)
        key, value = held[:, :, :, keys].unbind()
        part = attend_part(
            query[:, :, queries],
            key,
            value,
            _of(masks[source], keys),
            causal=triangle,
        )
        join_(out[:, :, queries], lse[:, :, queries], part)
        if following is not None:
            held = following.arrived()
    return out.to(query.dtype), lse


@torch.library.custom_op("flowmill::ring_attention_backward", mutates_args=())
def _differentiate(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries, and (2, batch, kv_heads, local tokens, head width) of keys and values.

    The keys go round once more, and behind them what their gradients have come to; these take one
    more step, to be at home again.
    """
    group = named_group(group_name)
    rank, size, tokens = dist.get_rank(group), dist.get_world_size(group), query.shape[2]
    masks = _masks(mask, group)
    queried = _by_tokens(query).zero_()
    held = torch.stack((key, value))
    returning: Travelling | None = None
    for turn in range(size):
        source = (rank - turn) % size
        following = send_on(held, group) if turn < size - 1 else None
        queries, keys, triangle = seen(rank, source, tokens, causal=causal)
        key, value = held[:, :, :, keys].unbind()
        part = part_gradients(
            gradient[:, :, queries],
            query[:, :, queries],
            key,
            value,
            Part(out[:, :, queries], lse[:, :, queries]),
            _of(masks[source], keys),
            causal=triangle,
        )
        queried[:, :, queries] += part.query
        summed = (
            torch.zeros_like(held, dtype=torch.float32)
            if returning is None
            else returning.arrived()
        )
        summed[0, :, :, keys] += part.key
        summed[1, :, :, keys] += part.value
        returning = send_on(summed, group)
        if following is not None:
            held = following.arrived()
    assert returning is not None
    return queried.to(query.dtype), returning.arrived().to(key.dtype)


@_attend.register_fake
def _(query: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return _by_tokens(query).to(query.dtype), query.new_empty(query.shape[:3], dtype=torch.float32)


@_differentiate.register_fake
def _(_gradient: Tensor, query: Tensor, key: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return _by_tokens(query).to(query.dtype), key.new_empty(2, *key.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, ctx.causal, ctx.group_name = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def _backward(ctx: Any, gradient: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask, out, lse = ctx.saved_tensors
    queried, kept = _differentiate(
        gradient, query, key, value, mask, out, lse, ctx.causal, ctx.group_name
    )
    return queried, kept[0], kept[1], None, None, None


_attend.register_autograd(_backward, setup_context=_keep)


def _masks(mask: Tensor | None, group: ProcessGroup) -> Sequence[Tensor | None]:
    """Of the keys of every rank; they are few bytes, so they do not travel with them."""
    if mask is None:
        return [None] * dist.get_world_size(group)
    return list(gather_mask(mask, group))


def _of(mask: Tensor | None, keys: slice) -> Tensor | None:
    return None if mask is None else mask[..., keys]


def _by_tokens(query: Tensor) -> Tensor:
    """Empty float32 memory in the shape of `query`, in which a token's heads lie side by side."""
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads, width, dtype=torch.float32).transpose(1, 2)
