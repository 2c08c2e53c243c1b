"""How experts are used: sums over the whole batch, what routers make of them, what people are told.

All of it is made of sums over samples, in one reduction a step, so it is the same on any layout.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flows.models.routers import rebalance, routers_of
from parallel.engines.engine import Engine, StepResult

BUCKETS = 10  # equal intervals of flow time in [0, 1]
MEMORY = 0.98  # of the table over steps


class RoutingSums(NamedTuple):
    """Sums over all samples of a step.

    load: (layers, BUCKETS, experts) slots that asked for each expert, by the flow time of their samples
    dropped, entropy, ties: (layers,), see `flows.routed.Routed`
    flow: (layers, experts, experts) of a step that is traced, else (0,)
    """

    load: Tensor
    dropped: Tensor
    entropy: Tensor
    ties: Tensor
    flow: Tensor


def sum_routing(
    result: StepResult, sum_over_data: Callable[[Tensor], Tensor], *, traced: bool = False
) -> RoutingSums | None:
    """Over all ranks, a collective; None for networks without experts.

    traced: whether this step's flow is wanted, of a network whose routers count it
    """
    routed, time = result.routed, result.time
    if routed is None or time is None:
        return None
    bucket = (time * BUCKETS).long().clamp(0, BUCKETS - 1)
    # A product with the one-hot matrix, not a scatter: the same bits on every run.
    member = F.one_hot(bucket, BUCKETS).to(routed.load.dtype)
    load = torch.einsum("nb,nle->lbe", member, routed.load)
    flow = routed.flow.sum(0) if traced else load.new_zeros(0)
    own = [load, *(value.sum(0) for value in routed[1:4]), flow]
    summed = sum_over_data(torch.cat([value.flatten() for value in own]))
    parts = summed.split([value.numel() for value in own])
    return RoutingSums(*(part.view_as(value) for part, value in zip(parts, own, strict=True)))


def rebalance_routers(engine: Engine, sums: RoutingSums, skip: Tensor) -> None:
    """Biases move and shares are remembered, alike on all ranks.

    skip: () 1 where the optimizer step was skipped
    """
    rebalance(routers_of(engine.outline()), sums.load.sum(1), skip)


class ExpertUse:
    """The routing of past steps, the recent ones more: a picture's numbers."""

    def __init__(self) -> None:
        self.table: Tensor | None = None

    def add(self, load: Tensor) -> None:
        """load: (layers, BUCKETS, experts) of one step."""
        self.table = load.clone() if self.table is None else self.table * MEMORY + load

    def state_dict(self) -> list[Any] | None:
        return None if self.table is None else self.table.tolist()

    def load_state_dict(self, state: list[Any] | None) -> None:
        self.table = None if state is None else torch.tensor(state, dtype=torch.float64)


def rows_of(sums: RoutingSums) -> dict[str, Tensor]:
    """As rows for the late reading of telemetry."""
    return {f"routing_{name}": value.flatten() for name, value in sums._asdict().items()}


def read_rows(rows: Mapping[str, tuple[float, ...]]) -> RoutingSums | None:
    """What `rows_of` gave, on the host, in float64; None if it gave nothing."""
    if "routing_load" not in rows:
        return None
    parts = (torch.tensor(rows[f"routing_{name}"]).double() for name in RoutingSums._fields)
    load, dropped, entropy, ties, flow = parts
    load = load.view(len(dropped), BUCKETS, -1)
    if len(flow):
        flow = flow.view(len(dropped), load.shape[-1], load.shape[-1])
    return RoutingSums(load, dropped, entropy, ties, flow)


def described(sums: RoutingSums, samples: float) -> dict[str, Any]:
    """A line's part for a network of experts; shares sum to one over experts.

    imbalance: of each layer, the load of its busiest expert over the mean
    dropped: share of all slots (of all tokens, where experts choose: those that none took)
    """
    load = sums.load.sum(1)
    share = load / load.sum(-1, keepdim=True)
    by_time = sums.load.sum(0)
    return {
        "load": {f"layer_{index}": row for index, row in enumerate(share.tolist())},
        "load_by_time": {
            f"time_{index}": (row / row.sum()).tolist() if row.sum() else None
            for index, row in enumerate(by_time)
        },
        "imbalance": (share.amax(-1) * share.shape[-1]).tolist(),
        "entropy": (sums.entropy / samples).tolist(),
        "dropped": float(sums.dropped.sum() / load.sum()),
        "ties": int(sums.ties.sum()),
    }
