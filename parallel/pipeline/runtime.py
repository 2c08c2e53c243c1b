"""A schedule run on real ranks, by the runtime of torch.distributed.pipelining.

That runtime knows one chain of stages. Here each replica is a chain of its own: stage i of replica d has
the index d (n + ranks) + i, so that no stage of one is the neighbour of a stage of the other; first and
last are told by the schedule; sends and receives are put in here, in one order for all ranks.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._utils import TensorMeta
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_unshard_reshard,
    _ComputationType,
    _PipelineScheduleRuntime,
)

from parallel.pipeline.deferred import Deferred
from parallel.pipeline.schedule import FREES, Action, Schedule, Work, gives
from parallel.pipeline.timeline import equal_costs, simulate

Held = tuple[int, int]  # (direction, stage)


class Stage(PipelineStage):
    """One stage of one replica on this rank."""

    def __init__(
        self,
        module: nn.Module,
        schedule: Schedule,
        held: Held,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._first, self._last = held[1] == 0, held[1] + 1 == schedule.stages
        split = any(action.work is Work.INPUT for row in schedule.actions for action in row)
        self._deferred = Deferred(module, getattr(module, "undivided", ())) if split else None
        super().__init__(
            module,
            index_of(schedule, held),
            schedule.directions * (schedule.stages + schedule.ranks),
            device,
            group=group,
            dw_builder=None if self._deferred is None else self._deferred.take,
        )

    @property
    def is_first(self) -> bool:
        return self._first

    @property
    def is_last(self) -> bool:
        return self._last

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        return _contiguous(super().forward_maybe_with_nosync(*args, **kwargs))

    def _compute_outputs(self, *args: Any, module: nn.Module, **kwargs: Any) -> Any:
        return _contiguous(super()._compute_outputs(*args, module=module, **kwargs))

    def _compute_input_grads(self, *args: Any, **kwargs: Any) -> Any:
        return _contiguous(super()._compute_input_grads(*args, **kwargs))

    def _to_tensor(self, arg: Any) -> Any:
        """A trial input or target; a target may be any record."""
        return super()._to_tensor(arg) if isinstance(arg, Tensor | TensorMeta) else arg

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self.bwd_cache[bwd_chunk_id] = _contiguous(self.bwd_cache[bwd_chunk_id])

    def _post_metadata_inference_cleanup(self) -> None:
        """After the trial backward by which shapes are found."""
        super()._post_metadata_inference_cleanup()
        if self._deferred is not None:
            self._deferred.forget()


class Runtime(_PipelineScheduleRuntime):
    """Runs steps of a schedule; every rank of `group` makes one, with all that it holds.

    modules: (direction, stage) -> what it computes; `module(*inputs, **conditions)` for a first stage,
        `module(*results of the stage before, **conditions)` for the others
    loss: of the last stage's results and a microbatch's target -> a scalar; gradients of the sum over
        all microbatches are left in the parameters
    """

    def __init__(
        self,
        schedule: Schedule,
        modules: Mapping[Held, nn.Module],
        loss: Callable[[Any, Any], Tensor],
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        held = schedule.local(dist.get_rank(group))
        stages = [Stage(modules[key], schedule, key, device, group) for key in held]
        super().__init__(stages, schedule.microbatches, loss, scale_grads=False)
        self.schedule = schedule
        where = {
            index_of(schedule, (direction, stage)): rank
            for direction, places in enumerate(schedule.places)
            for stage, rank in enumerate(places)
        }
        self.stage_index_to_group_rank = where
        for stage in stages:
            stage.stage_index_to_group_rank = where
        self.pipeline_order_with_comms = {
            rank: _add_unshard_reshard(cast(Any, order))
            for rank, order in enumerate(with_transfers(schedule))
        }
        self._losses: dict[int, Tensor] = {}
        self._adding: list[tuple[dist.Work, Tensor, list[Tensor]]] = []
        self._pair = _pair_group(group) if schedule.directions == 2 else None
        self.register_custom_function(_ComputationType.REDUCE_GRAD, self._reduce)

    def run(
        self,
        inputs: Sequence[tuple[Tensor, ...]],
        conditions: Sequence[dict[str, Any]],
        targets: Sequence[Any],
    ) -> dict[int, Tensor]:
        """One step over all microbatches; each argument has one entry a microbatch.

        Inputs are read by ranks with a first stage, targets by those with a last one, conditions by all.
        result: microbatch -> detached loss, of those whose last stage is here
        """
        for stage in self._stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        self._losses = {}
        self._step_microbatches(list(inputs), list(conditions), list(targets), return_outputs=False)
        while self._adding:
            work, flat, gradients = self._adding.pop()
            work.wait()
            torch._foreach_copy_(gradients, _pieces(flat, gradients))
        return {number: loss.detach() for number, loss in self._losses.items()}

    def _reduce(self, action: _Action, ctx: Any) -> None:  # noqa: ARG002 - called by name
        """A stage's gradients are whole: finish them over data ranks, begin to add the twin's."""
        stage = next(one for one in self._stages if one.stage_index == action.stage_index)
        stage.perform_reduce_grad(1)
        if self._pair is None:
            return
        gradients = [_local(p.grad) for p in _own(stage.submod) if p.grad is not None]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            work = dist.all_reduce(flat, group=self._pair, async_op=True)
            assert work is not None
            self._adding.append((work, flat, gradients))

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, *_: Any
    ) -> None:
        if stage.is_last:
            self._losses[mb_index] = self._compute_loss(output, target_mbs[mb_index])

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Tensor | None:
        return self._losses[mb_index] if stage.is_last else None

    def _update_losses(self, stages: Any, losses: Any) -> None:
        """They are kept by microbatch; see `run`."""


def silence_schedules() -> None:
    """Let the runtime print nothing of its own.

    Where a rank is lost, the others would write out their whole schedules before the error is told.
    """
    logging.getLogger(schedules.__name__).setLevel(logging.CRITICAL)


def _contiguous(results: Any) -> Any:
    """One tensor or several, some of them None, as they must lie to be sent."""
    if isinstance(results, tuple | list):
        return tuple(_contiguous(result) for result in results)
    return results.contiguous() if isinstance(results, Tensor) else results


def index_of(schedule: Schedule, held: Held) -> int:
    """What the runtime calls a stage."""
    return held[0] * (schedule.stages + schedule.ranks) + held[1]


def with_transfers(schedule: Schedule) -> list[list[_Action]]:
    """The order of every rank with sends and receives, and with the end of each stage's gradients.

    Work is taken in the order in which a simulation ends it. A result is sent as soon as it is there, and
    is waited for by the other rank from then on, while that one does what it is at: so all transfers
    between two ranks stand in the same order on both.
    """
    orders: list[list[_Action]] = [[] for _ in schedule.actions]
    timeline = simulate(schedule, equal_costs(schedule.stages))
    ends = sorted(
        (event.end, rank, place, event.action)
        for rank, row in enumerate(timeline.events)
        for place, event in enumerate(row)
    )
    left = {
        held: sum(
            action.work in FREES and (action.direction, action.stage) == held
            for action in schedule.actions[rank]
        )
        for rank in range(schedule.ranks)
        for held in schedule.local(rank)
    }
    for _, rank, _, action in ends:
        held = action.direction, action.stage
        if action.work is Work.SYNC:
            orders[rank].append(_named(schedule, action, "REDUCE_GRAD"))
            continue
        orders[rank].append(_named(schedule, action, action.work.value))
        _transfer(schedule, action, orders)
        left[held] -= action.work in FREES
        if not left[held] and action.work in FREES and schedule.directions == 1:
            orders[rank].append(_named(schedule, action, "REDUCE_GRAD"))
    return orders


def _transfer(schedule: Schedule, action: Action, orders: list[list[_Action]]) -> None:
    """Add the send and the receive of what an action gives to another rank, if it does."""
    given = gives(action)
    if given is None:
        return
    forward = action.work is Work.FORWARD
    after = action.stage + (1 if forward else -1)
    if not 0 <= after < schedule.stages:
        return
    places = schedule.places[action.direction]
    if places[action.stage] == places[after]:
        return
    reader = Action(action.direction, after, action.work, action.microbatch)
    kind = "F" if forward else "B"
    orders[places[action.stage]].append(_named(schedule, action, f"SEND_{kind}"))
    orders[places[after]].append(_named(schedule, reader, f"RECV_{kind}"))


def _named(schedule: Schedule, action: Action, kind: str) -> _Action:
    index = index_of(schedule, (action.direction, action.stage))
    number = None if kind == "REDUCE_GRAD" else action.microbatch
    return _Action(index, _ComputationType(kind), number)


def _pair_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """This rank and the one that holds the twins of its stages: its mirror image."""
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    own = dist.get_rank(group)
    pair = sorted({ranks[own], ranks[len(ranks) - 1 - own]})
    return cast(dist.ProcessGroup, dist.new_group(pair, use_local_synchronization=True))


def _own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that this stage alone uses on this rank."""
    others = {p for shared in getattr(module, "undivided", ()) for p in shared.parameters()}
    return [parameter for parameter in module.parameters() if parameter not in others]


def _local(tensor: Tensor) -> Tensor:
    """The part of a gradient that lies here."""
    return cast(Any, tensor).to_local() if hasattr(tensor, "to_local") else tensor


def _pieces(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    sizes = [tensor.numel() for tensor in like]
    parts = flat.split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
