"""Attention of some queries over some of their keys, with what is needed to join it with the rest.

For logits s = q k^T / sqrt(head width) and the keys of one part, a part gives

    out = softmax(s) v        lse = log sum exp s        (FlashAttention's pair)

and any two parts of the same queries are one: lse = log(e^lse_1 + e^lse_2), out = sum_i e^(lse_i - lse)
out_i.
Backwards, with the `out` and `lse` of *all* keys, the gradients of a part are those of the whole.

Shapes here: query, out (batch, heads, queries, head width); key, value (batch, kv_heads, keys, head
width), each head shared by heads / kv_heads queries; lse (batch, heads, queries) float32; mask (batch,
1, 1, keys) bool, false for keys that nobody sees. A query that sees no key has out 0 and lse -inf.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = torch.finfo(torch.float32).min
# The fused kernel of CUDA takes heads of multiples of this width, and pads logsumexps to rows of this many.
WIDTHS, ROW = 8, 32

aten = torch.ops.aten


class Part(NamedTuple):
    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor


def attend_part(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, causal: bool
) -> Part:
    """causal: query i sees the keys 0 ... i alone; as many queries as keys."""
    if mask is None and query.device.type == "cpu":
        return Part(
            *aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal)
        )
    if mask is None and _fused_on_cuda(query):
        return _attend_cuda(query, key, value, causal)
    logits, value = _logits(query, key, mask, causal), _shared(value, query).float()
    lse = logits.logsumexp(-1)
    return Part((_weights(logits, lse) @ value).to(query.dtype), lse)


def part_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    whole: Part,
    mask: Tensor | None,
    *,
    causal: bool,
) -> Gradients:
    """Of query, key and value, as far as this part goes, from the gradient of `whole.out`.

    whole: what these queries got from all their keys
    """
    if mask is None and query.device.type == "cpu":
        return Gradients(
            *aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, query, key, value, whole.out, whole.lse, 0.0, causal
            )
        )
    if mask is None and _fused_on_cuda(query):
        return _gradients_cuda(gradient, query, key, value, whole, causal)
    keys, values = _shared(key, query).float(), _shared(value, query).float()
    weights = _weights(_logits(query, key, mask, causal), whole.lse)
    gradient = gradient.float()
    moved = (gradient * whole.out.float()).sum(-1, keepdim=True)
    logits = weights * (gradient @ values.mT - moved) / math.sqrt(query.shape[-1])
    return Gradients(
        (logits @ keys).to(query.dtype),
        _unshared(logits.mT @ query.float(), key),
        _unshared(weights.mT @ gradient, value),
    )


def join_(out: Tensor, lse: Tensor, part: Part) -> None:
    """Join a part of the same queries with what they have, in place; both float32."""
    total = torch.logaddexp(lse, part.lse)
    # Where nothing was seen yet, -inf less -inf would be no number.
    floor = total.clamp(min=LEAST)
    out.mul_((lse - floor).exp()[..., None])
    out.addcmul_(part.out.float(), (part.lse - floor).exp()[..., None])
    lse.copy_(total)


def _logits(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """(batch, heads, queries, keys) float32, -inf for what is not seen."""
    keys = _shared(key, query).float()
    logits = query.float() @ keys.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    return (logits - lse.clamp(min=LEAST)[..., None]).exp()


def _shared(heads: Tensor, query: Tensor) -> Tensor:
    """Keys or values once for each head of the queries."""
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1)


def _unshared(gradient: Tensor, heads: Tensor) -> Tensor:
    """The gradient of `heads` from that of what `_shared` made of it."""
    summed: Tensor = gradient.unflatten(1, (heads.shape[1], -1)).sum(2)
    return summed.to(heads.dtype)


def _fused_on_cuda(query: Tensor) -> bool:
    return query.device.type == "cuda" and query.shape[-1] % WIDTHS == 0


def _attend_cuda(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Part:
    """Not run by the tests, which have no CUDA device: the fused kernel that has all dtypes."""
    key, value = _shared(key, query), _shared(value, query)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, causal
    )
    return Part(out, lse[..., : query.shape[2]])


def _gradients_cuda(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, whole: Part, causal: bool
) -> Gradients:
    """The backward of `_attend_cuda`; its last numbers say how dropout was drawn, and none was."""
    keys, values = _shared(key, query), _shared(value, query)
    # As the forward pads them: no query there has a weight.
    rows = F.pad(whole.lse, (0, -whole.lse.shape[-1] % ROW), value=torch.inf).contiguous()
    drawn = torch.zeros((), dtype=torch.int64, device=query.device)
    found = aten._scaled_dot_product_efficient_attention_backward(
        gradient, query, keys, values, None, whole.out, rows, drawn, drawn, 0.0,
        [True, True, True, False], causal,
    )  # fmt: skip
    return Gradients(found[0], _unshared(found[1], key), _unshared(found[2], value))
