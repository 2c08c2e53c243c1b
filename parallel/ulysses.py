"""Ulysses: for the time of the attention, ranks hold all tokens of some heads.

Jacobs et al. 2023, "DeepSpeed Ulysses". A rank has all heads of its run of tokens; one exchange of
queries, keys and values gives it all tokens of heads / n of them, and another takes what was mixed
back. In between is the kernel of one device, so that masks and causality are its own affair.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from flows.models.attention import Kernel
from parallel.exchange import gather_mask, in_dtype_of_products, send_to_each


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    kernel: Kernel,
    group: ProcessGroup,
) -> Tensor:
    """`kernel` over the tokens of all ranks of `group`, of which each holds the next run; a collective.

    query: (batch, heads, local tokens, head width), heads divisible by ranks; returns the same shape
    key, value: (batch, kv_heads, local tokens, head width), kv_heads divisible by ranks
    mask: (batch, 1, 1, local tokens) bool, false for keys that nobody sees
    kernel: of whole sequences
    """
    size = dist.get_world_size(group)
    tensors = in_dtype_of_products(query, key, value)
    # Of each rank's share of heads, its queries, keys and values go in one message.
    shares = [tensor.unflatten(1, (size, -1)) for tensor in tensors]
    heads = [share.shape[2] for share in shares]
    received = send_to_each(torch.cat(shares, dim=2).movedim(1, 0), group)
    whole = received.movedim(0, 2).flatten(2, 3)
    query, key, value = whole.split(heads, dim=1)
    seen = None if mask is None else gather_mask(mask, group).movedim(0, -2).flatten(-2)
    mixed = kernel(query, key, value, seen)
    returned = send_to_each(mixed.unflatten(2, (size, -1)).movedim(2, 0), group)
    return returned.movedim(0, 1).flatten(1, 2)


def ulysses_bytes(queries: int, keys: int, element: int, size: int) -> int:
    """What a rank sends in a step for one attention that is not recomputed, in bytes.

    Queries, keys, values and outputs are exchanged forward, and their gradients backward; each rank
    keeps its own share of heads.

    queries, keys: numbers in those of one rank, batch * heads * local tokens * head width
    element: bytes of each
    """
    return 2 * (2 * queries + 2 * keys) // size * (size - 1) * element
