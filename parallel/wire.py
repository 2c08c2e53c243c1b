"""What a rank sends in a step: counted as it is handed to the backend, and what it has to be.

A collective is counted as a ring sends it, which is the least there is: of b bytes on n ranks a sum sends
2 (n - 1) / n b, a gather to b bytes and a scatter of b bytes (n - 1) / n b each, an exchange (n - 1) / n b, a
broadcast of b bytes (n - 1) / n b. Formulas of layers that ranks share are beside them (`pair_bytes`,
`ring_bytes`, `ulysses_bytes`); here are those of parameters, which do not depend on samples.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operator -> what a ring sends of its largest tensor, in units of (n - 1) / n.
COSTS = {
    "allreduce_": 2,
    "all_reduce": 2,
    "_allgather_base_": 1,
    "all_gather_into_tensor": 1,
    "allgather_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_tensor": 1,
    "alltoall_base_": 1,
    "all_to_all_single": 1,
    "broadcast_": 1,
}
# What waits and sends nothing.
SILENT = ("barrier", "wait_tensor", "monitored_barrier_")


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends within a `with` block, by the size of the group it is sent in.

    Raises NotImplementedError for a collective that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = Fraction(0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema.name.partition("::")[2], args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any, kwargs: Any) -> None:
        if name in SILENT:
            return
        if name not in COSTS:
            raise NotImplementedError(f"nothing is known of what {name} sends")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
        ranks = _group_size([*args, *kwargs.values()])
        if name == "all_gather_into_tensor":  # is given a part, and gives the whole
            size *= ranks
        self.total += COSTS[name] * share(size, ranks)


def share(size: int, ranks: int) -> Fraction:
    """What a ring sends of `size` bytes that every rank has a part of."""
    return Fraction(size * (ranks - 1), ranks)


def padded(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Numbers in parameters whose rows are dealt out to ranks, the last ones filled up."""
    return sum(
        ranks * -(-shape[0] // ranks) * math.prod(shape[1:])
        for shape in (parameter.shape for parameter in parameters)
    )


def ddp_bytes(numbers: int, ranks: int) -> Fraction:
    """DDP, and ZeRO 0: the sum of all gradients, in float32."""
    return 2 * share(4 * numbers, ranks)


def fsdp_bytes(
    blocks: int, rest: int, shard: int, replicate: int, *, microbatches: int = 1, gather: int = 4
) -> Fraction:
    """FSDP2, HSDP: for each microbatch blocks are gathered forward and backward, the rest once; with the last
    all gradients are scattered, and with copies the parts are summed over them.

    blocks, rest: numbers in them, `padded`
    gather: bytes of a number as it is gathered; gradients are float32
    """
    gathered = microbatches * share(gather * (2 * blocks + rest), shard)
    parts = 4 * (blocks + rest) // shard
    return gathered + share(4 * (blocks + rest), shard) + 2 * share(parts, replicate)


def zero_bytes(stage: int, numbers: int, ranks: int) -> Fraction:
    """ZeRO 1 to 3, of which DeepSpeed fills up the line of all parameters or, in stage 3, each of them.

    1, 2: gradients are summed, new weights gathered. 3: gradients are scattered, weights gathered once for
    forward and backward (twice if they are more than stage3_max_live_parameters).
    """
    if stage == 3:
        return 2 * share(4 * numbers, ranks)
    return 2 * share(4 * numbers, ranks) + share(4 * _even(numbers, 2 * ranks), ranks)


def _even(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor


def _group_size(values: Sequence[Any]) -> int:
    for value in values:
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return int(dist.ProcessGroup.unbox(value).size())
        if isinstance(value, str):
            group = dist.distributed_c10d._resolve_process_group(value)  # type: ignore[attr-defined, arg-type]
            return int(group.size())
    raise NotImplementedError("a collective without a group")
