"""The native engine: PyTorch's own FSDP2, HSDP and DDP, or one rank alone.

The gradient of a step is that of (sum of per-sample losses over all ranks) / global batch, however
the batch is split over ranks and microbatches. Ranks are averaged by DDP and FSDP, so each rank
differentiates its own sum times (data ranks / global batch). Microbatches add up locally and travel
once, with the last.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from flows.batch import Batch
from flows.objectives.objective import Objective
from parallel.engines.engine import (
    Start,
    StepResult,
    T,
    over_microbatches,
    require_fused,
)
from parallel.execution import Execution
from parallel.fsdp import held_whole, release_gathered
from parallel.gradients import clip_gradients, sum_partial
from parallel.mesh import DATA_AXES, PEER_AXES, Layout, data_rank, groups_along
from parallel.parallelize import ParallelModel, parallelize
from parallel.pieces import Slice
from parallel.precision import computing


class NativeEngine:
    """See `parallel.engines.engine.Engine`."""

    def __init__(
        self,
        model: ParallelModel,
        execution: Execution,
        start: Start,
        *,
        data_rank: int,
        data_size: int,
        data_groups: Sequence[ProcessGroup],
        peer_groups: Sequence[ProcessGroup],
    ) -> None:
        """execution: as the model was made
        data_groups: the axes along which ranks read different samples, the outermost first
        peer_groups: the axes along which they share samples, `tp` the last
        """
        self.device = start.device
        self.data_rank, self.data_size = data_rank, data_size
        self._clock, self._execution = start.clock, execution
        self._data_groups, self._peer_groups = data_groups, peer_groups
        self._model = model
        self._optimizer = require_fused(start.optimizer(list(model.parameters.items())))
        self._create_optimizer_state()

    def parameters(self) -> dict[str, Tensor | Slice]:
        return self._model.held

    def optimizer_tensors(self) -> dict[str, Tensor | Slice]:
        return {
            f"{name}.{slot}": self._model.placed(name, value) if value.dim() else value
            for name, parameter in self._model.parameters.items()
            for slot, value in self._optimizer.state[parameter].items()
        }

    def forward_backward(
        self,
        microbatches: Sequence[Batch],
        objective: Objective,
        seed: int,
        step: int,
        global_batch: int,
    ) -> StepResult:
        def backward(loss: Tensor) -> None:
            (loss * (self.data_size / global_batch)).backward()

        result = over_microbatches(
            microbatches,
            objective,
            seed,
            step,
            clock=self._clock,
            around=self._synchronising,
            forward=self._forward,
            backward=backward,
        )
        self._sum_partial()
        return result

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        with self._clock.phase("gradient_norm"):
            # Where weights lie on the host their gradients do, and this waits for them.
            return clip_gradients(self._model.held.values(), max_norm).to(self.device)

    def step(self, learning_rate: float, skip: Tensor) -> None:
        with self._clock.phase("optimizer"):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._step_unless(skip)
            self._optimizer.zero_grad(set_to_none=True)

    def sum_over_data(self, values: Tensor) -> Tensor:
        return _summed(values, self._data_groups)

    def sum_over_peers(self, values: Tensor) -> Tensor:
        return _summed(values, self._peer_groups)

    def gather_over_data(self, values: Tensor) -> Tensor:
        gathered = values.detach()
        for group in reversed(self._data_groups):  # `data_rank` counts the last axis fastest
            size = dist.get_world_size(group)
            parts = [torch.empty_like(gathered) for _ in range(size)]
            dist.all_gather(parts, gathered.contiguous(), group=group)
            gathered = torch.cat(parts)
        return gathered

    @torch.no_grad()
    def run(self, function: Callable[[nn.Module], T], *, whole: bool) -> T:
        if whole and self._model.single is not None:
            with computing(self._execution.precision, self.device):
                return function(self._model.copy(self.device).eval())
        model = self._model.bare
        held = held_whole(model, self._execution.reshard_after_forward) if whole else nullcontext()
        model.eval()
        try:
            with self._sampling_stance(), computing(self._execution.precision, self.device), held:
                return function(model)
        finally:
            model.train()
            # Without a backward nobody drops them, and the caller may write other weights next.
            release_gathered(model)

    def outline(self) -> nn.Module:
        return self._model.bare

    def _sum_partial(self) -> None:
        """Gradients that are those of a part of the work become those of all of it."""
        if self._model.partial:
            partial = [self._model.parameters[name] for name in self._model.partial]
            sum_partial(partial, self._peer_groups[-1])

    def _forward(self, inputs: dict[str, Tensor]) -> Any:
        with computing(self._execution.precision, self.device):
            return self._model.trained(**inputs)

    def _step_unless(self, skip: Tensor) -> None:
        """The gradient scaler's way of skipping: the kernels themselves look at `found_inf`."""
        optimizer = self._optimizer
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        home = next(iter(self._model.parameters.values())).device
        optimizer.found_inf = skip.to(home, torch.float32)  # type: ignore[attr-defined]
        optimizer.step()

    def _create_optimizer_state(self) -> None:
        """A skipped step on zero gradients: state exists and is zero, weights are untouched."""
        for parameter in self._model.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self._step_unless(torch.ones((), device=self.device))
        self._optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _synchronising(self, last: bool) -> Iterator[None]:
        """Gradients travel between ranks at the end of the last microbatch's backward alone."""
        model = self._model.trained
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        if isinstance(model, DistributedDataParallel) and not last:
            with model.no_sync():
                yield
        else:
            yield

    def _sampling_stance(self) -> AbstractContextManager[object]:
        """Samples come in many batch sizes; compiling for each would cost more than it saves."""
        return (
            torch.compiler.set_stance("force_eager") if self._execution.compile else nullcontext()
        )


def _summed(values: Tensor, groups: Sequence[ProcessGroup]) -> Tensor:
    total = values.detach().clone()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


def build(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    execution: Execution,
    start: Start,
) -> NativeEngine:
    """The engine of a `FlowModel` on the meta device, laid over the mesh and drawn from `seed`."""
    return NativeEngine(
        parallelize(model, mesh, layout, execution, device=start.device, seed=start.seed),
        execution,
        start,
        data_rank=data_rank(mesh),
        data_size=layout.data_size,
        data_groups=groups_along(mesh, DATA_AXES),
        peer_groups=groups_along(mesh, PEER_AXES),
    )
