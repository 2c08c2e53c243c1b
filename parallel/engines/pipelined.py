"""The engine of a model whose links lie over the ranks of `pp`, as a schedule says.

The gradient is that of the native engine: (sum of per-sample losses over all ranks) / global batch. All
ranks of a pipeline have the same samples and draw the same noise; the first stage's go into the network, the
last stage's results are compared. Of the weights, those of links lie on one rank of the pipeline (on two
where the schedule has two directions); those by which the condition is computed lie on all, and each rank
has the part of their gradient that comes from its own stages. Over data ranks parameters are cut by FSDP,
or are copies, whose gradients are averaged here; the work of a stage may be shared over `tp` and `cp`, its
experts over `ep`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flows.batch import Batch
from flows.models.routers import is_traced, routing_shape
from flows.objectives.objective import Objective, Prepared
from flows.randomness import Draw
from flows.routed import Mixed, Routed
from parallel.engines.engine import OptimizerFactory, Start, StepResult, T, require_fused
from parallel.engines.native import NativeEngine
from parallel.execution import Execution
from parallel.gradients import EPSILON, gradient_norm, sum_partial
from parallel.mesh import DATA_AXES, PEER_AXES, Layout, data_rank, groups_along
from parallel.parallelize import ParallelModel
from parallel.pieces import local_part, whole_tensor
from parallel.pipeline.laid import Pipeline, lay_pipeline
from parallel.pipeline.runtime import Runtime, silence_schedules
from parallel.pipeline.schedule import Schedule
from parallel.precision import computing


class PipelinedEngine(NativeEngine):
    """See `parallel.engines.engine.Engine`."""

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: Schedule,
        layout: Layout,
        mesh: DeviceMesh,
        execution: Execution,
        start: Start,
        **groups: Any,
    ) -> None:
        """groups: and this rank's place in them, of `NativeEngine`"""
        parts = nn.ModuleList(pipeline.parts.values())
        start = replace(start, optimizer=partial(_apart, start.optimizer))
        divided = pipeline.divided
        laid_out = ParallelModel(
            parts, parts, pipeline.parameters, divided.cuts, divided.partial, pipeline.single
        )
        super().__init__(laid_out, execution, start, **groups)
        self._pipeline, self._pp = pipeline, mesh.get_group("pp")
        self._cut_over_data = layout.strategy in ("fsdp", "hsdp")
        # Ranks with parts of one sequence average as if they had different samples, as FSDP does.
        self._averaged = groups_along(mesh, (*DATA_AXES, "cp"))
        self._copies = layout.data_size * layout.cp
        self._losses: dict[int, Tensor] = {}
        self._routed: dict[int, Routed] = {}
        self._shape = routing_shape(pipeline.single)
        self._global_batch = 1
        self._objective: Objective | None = None
        self._runtime = Runtime(
            schedule, pipeline.parts, self._loss, group=self._pp, device=self.device
        )

    def forward_backward(
        self,
        microbatches: Sequence[Batch],
        objective: Objective,
        seed: int,
        step: int,
        global_batch: int,
    ) -> StepResult:
        self._objective, self._global_batch = objective, global_batch
        with self._clock.phase("forward"):
            prepared = [
                objective.prepare(batch, Draw(seed, step, batch.position)) for batch in microbatches
            ]
        with self._clock.phase("backward"):
            # Forwards and backwards take turns.
            compared = self._runtime.run(
                [(one.inputs["x"],) for one in prepared],
                [_without(one.inputs, "x") for one in prepared],
                list(enumerate(prepared)),
            )
            self._sum_gradients()
        times = [one.time for one in prepared if one.time is not None]
        time = torch.cat(times) if times else None
        losses = self._gathered(microbatches, compared.keys())
        return StepResult(losses, time, self._gathered_routing(microbatches, compared.keys()))

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        with self._clock.phase("gradient_norm"), torch.no_grad():
            own = self._pipeline.parameters
            held = self._model.held
            squares = gradient_norm(held[name] for name in self._pipeline.counted).square()
            squares = squares.to(self.device)
            dist.all_reduce(squares, group=self._pp)
            norm = squares.sqrt()
            gradients = [local_part(p.grad) for p in own.values() if p.grad is not None]
            if max_norm is not None:
                torch._foreach_mul_(gradients, (max_norm / (norm + EPSILON)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def run(self, function: Callable[[nn.Module], T], *, whole: bool) -> T:
        """The network is put together on every rank meanwhile, whether `whole` is asked for or not."""
        del whole
        with computing(self._execution.precision, self.device):
            return function(self._copy().eval())

    def outline(self) -> nn.Module:
        return next(iter(self._pipeline.parts.values())).model

    def _loss(self, outputs: Any, target: tuple[int, Prepared]) -> Tensor:
        """Of one microbatch, scaled as gradients are to be; the samples' own losses are kept."""
        number, prepared = target
        assert self._objective is not None
        if self._shape is not None:  # the runtime makes a plain tuple of it when it asks for shapes
            outputs = Mixed(*outputs)
        loss = self._objective.loss(outputs, prepared.targets)
        self._losses[number] = loss.detach()
        if isinstance(outputs, Mixed):
            self._routed[number] = outputs.routed
        return loss.sum() * (self.data_size / self._global_batch)

    def _gathered(self, microbatches: Sequence[Batch], compared: Collection[int]) -> Tensor:
        """(local batch,) losses, which the ranks with a last stage tell the others.

        compared: the numbers of the microbatches whose last stage is here
        """
        losses = [
            self._losses[number]
            if number in compared
            else torch.zeros(len(batch), device=self.device)
            for number, batch in enumerate(microbatches)
        ]
        line = torch.cat(losses)
        dist.all_reduce(line, group=self._pp)
        return line

    def _gathered_routing(
        self, microbatches: Sequence[Batch], compared: Collection[int]
    ) -> Routed | None:
        """What routers did with each sample, which the ranks with a last stage tell the others."""
        if self._shape is None:
            return None
        layers, experts = self._shape
        side = experts if is_traced(self._pipeline.single) else 0
        parts = []
        for number, batch in enumerate(microbatches):
            if number in compared:
                told = self._routed[number]
                own = [value.reshape(len(batch), layers, -1) for value in told[:4]]
                parts.append(torch.cat((*own, told.flow.flatten(2)), -1))
            else:
                shape = len(batch), layers, experts + 3 + side**2
                parts.append(torch.zeros(shape, device=self.device))
        line = torch.cat(parts)
        dist.all_reduce(line, group=self._pp)
        load, *rest, flow = line.split((experts, 1, 1, 1, side**2), -1)
        dropped, entropy, ties = (value.squeeze(-1) for value in rest)
        return Routed(load, dropped, entropy, ties, flow.unflatten(-1, (side, side)))

    def _sum_gradients(self) -> None:
        """Of conditions over the pipeline; of whatever is not cut over data ranks, over these."""
        own, told = self._pipeline.parameters, self._pipeline.told
        for name in told:
            if own[name].grad is None:  # no stage here uses it
                own[name].grad = torch.zeros_like(own[name])
        sum_partial([own[name] for name in told], self._pp)
        copied = [own[name] for name in own if name in told or not self._cut_over_data]
        for group in self._averaged:
            sum_partial(copied, group)
        if copied and self._copies > 1:
            gradients = [p.grad for p in copied if p.grad is not None]
            torch._foreach_div_(gradients, float(self._copies))
        self._sum_partial()

    def _copy(self) -> nn.Module:
        """The model as one device has it, with the weights of now; a collective."""
        copy = deepcopy(self._pipeline.single).to_empty(device=self.device)
        ranks = dist.get_process_group_ranks(self._pp)
        for name, parameter in copy.named_parameters():
            owner = self._pipeline.owners[name]
            if dist.get_rank(self._pp) == owner:
                held = self._model.placed(name, self._pipeline.parameters[name])
                parameter.copy_(whole_tensor(held))
            dist.broadcast(parameter, src=ranks[owner], group=self._pp)
        for own, buffer in zip(copy.buffers(), self.outline().buffers(), strict=True):
            own.copy_(buffer)
        return copy


class Together(torch.optim.Optimizer):
    """Several fused optimizers that step or skip as one: a kernel takes DTensors or tensors, not both."""

    grad_scale: Tensor | None
    found_inf: Tensor
    _step_supports_amp_scaling = True

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = [require_fused(optimizer) for optimizer in optimizers]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return {key: of for optimizer in self._optimizers for key, of in optimizer.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self._optimizers:
            optimizer.grad_scale = self.grad_scale  # type: ignore[attr-defined]
            optimizer.found_inf = self.found_inf  # type: ignore[attr-defined]
            optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)


def _apart(
    factory: OptimizerFactory, named: list[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """One optimizer for what is cut over data ranks, another for what is not."""
    cut_ones = [isinstance(parameter, DTensor) for _, parameter in named]
    if len(set(cut_ones)) == 1:
        return factory(named)
    halves = [
        [one for one, is_cut in zip(named, cut_ones, strict=True) if is_cut is wanted]
        for wanted in (True, False)
    ]
    return Together([factory(half) for half in halves])


def _without(inputs: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in inputs.items() if key != name}


def build(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    schedule: Schedule,
    costs: Sequence[float],
    execution: Execution,
    start: Start,
) -> PipelinedEngine:
    """The engine of a model on the meta device that has a chain, cut by the costs of its links.

    execution: blocks are not compiled and stay gathered, whatever it says
    """
    silence_schedules()
    execution = replace(execution, compile=False, reshard_after_forward=False)
    pipeline = lay_pipeline(
        model, mesh, layout, schedule, costs, execution, device=start.device, seed=start.seed
    )
    return PipelinedEngine(
        pipeline,
        schedule,
        layout,
        mesh,
        execution,
        start,
        data_rank=data_rank(mesh),
        data_size=layout.data_size,
        data_groups=groups_along(mesh, DATA_AXES),
        peer_groups=groups_along(mesh, ("pp", *PEER_AXES)),
    )
