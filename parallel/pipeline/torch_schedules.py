"""The schedules of torch.distributed.pipelining, read from its own schedule objects."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

from torch import nn

from parallel.pipeline.schedule import Action, Schedule, Work, looped, v_shaped

# By name, and imported when one is asked for: with them comes PyTorch's compiler, a good part of the time in
# which a run without pipelines starts.
MODULE = "torch.distributed.pipelining"
SINGLE = {"gpipe": "ScheduleGPipe"}
LOOPED = {
    "interleaved1f1b": "ScheduleInterleaved1F1B",
    "looped_bfs": "ScheduleLoopedBFS",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
}
V_SHAPED = {"zbv": "ScheduleZBVZeroBubble", "dualpipev": "ScheduleDualPipeV"}


def torch_schedule(name: str, ranks: int, microbatches: int, chunks: int) -> Schedule:
    """A schedule of one replica.

    chunks: stages on every rank; 1 for those of SINGLE, 2 for those of V_SHAPED
    """
    stages = ranks * chunks
    places = v_shaped(ranks) if name in V_SHAPED else looped(ranks, chunks)
    kind: Any = getattr(import_module(MODULE), {**SINGLE, **LOOPED, **V_SHAPED}[name])
    held = [_bare_stage(stage, ranks, stages) for stage in range(chunks)]
    order = kind(held[0] if name in SINGLE else held, microbatches).pipeline_order
    actions = tuple(tuple(_actions(order[rank])) for rank in range(ranks))
    return Schedule(name, microbatches, (places,), actions)


def one_forward_one_backward(ranks: int, microbatches: int) -> Schedule:
    """1F1B, or PipeDream-Flush: a rank has as many microbatches on their way as ranks come after it, and one.

    Written out, since the list that torch 2.13 gives for it leaves microbatch 0 out on the last rank.
    """
    orders = []
    for rank in range(ranks):
        warm_up = min(ranks - 1 - rank, microbatches)
        forwards = [Action(0, rank, Work.FORWARD, number) for number in range(microbatches)]
        backwards = [Action(0, rank, Work.BACKWARD, number) for number in range(microbatches)]
        steady = zip(forwards[warm_up:], backwards, strict=False)
        order = forwards[:warm_up] + [action for pair in steady for action in pair]
        orders.append(tuple(order + backwards[microbatches - warm_up :]))
    return Schedule("1f1b", microbatches, (looped(ranks, 1),), tuple(orders))


def _bare_stage(index: int, ranks: int, stages: int) -> Any:
    """As much of a stage as its order is made from."""
    return SimpleNamespace(
        stage_index=index,
        num_stages=stages,
        group_size=ranks,
        group_rank=0,
        submod=nn.Identity(),
        stage_index_to_group_rank={},
    )


def _actions(order: list[Any]) -> list[Action]:
    """Without waits and reductions; overlapped forwards and backwards run one after the other."""
    found = []
    for entry in order:
        for part in [] if entry is None else entry.sub_actions or (entry,):
            if part.computation_type.value in set(Work):
                work = Work(part.computation_type.value)
                found.append(Action(0, part.stage_index, work, part.microbatch_index))
    return found
