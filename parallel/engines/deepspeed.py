"""The DeepSpeed engine: ZeRO 0 to 3, with optimizer and parameters on the host if asked.

The gradient of a step is that of (sum of per-sample losses over all ranks) / global batch, as in the
native engine: DeepSpeed averages over the ranks, so each differentiates its own sum times (ranks /
global batch), and its division by the number of microbatches is left out.

DeepSpeed's optimizer step measures, clips and steps in one; here the norm comes first, and clipping
and skipping are left to the fused optimizer's kernels (`grad_scale`, `found_inf`), which look at
numbers on the device. Stages 1 and 2 wait for nothing; stage 3, and an optimizer on the host, look
at the norm once more on their own and wait for it.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.batch import Batch
from flows.initialise import rules_of
from flows.objectives.objective import Objective
from parallel.engines.deepspeed_config import Json
from parallel.engines.engine import (
    Start,
    StepResult,
    T,
    over_microbatches,
    require_fused,
)
from parallel.engines.zero import Cut, Holding, Whole
from parallel.execution import Execution, prepare_blocks
from parallel.gradients import EPSILON
from parallel.initialise import fill_parameters
from parallel.parallelize import FlowModel
from parallel.pieces import Held
from parallel.precision import computing


class DeepSpeedEngine:
    """See `parallel.engines.engine.Engine`."""

    def __init__(
        self,
        inner: Any,
        names: Sequence[str],
        execution: Execution,
        start: Start,
    ) -> None:
        """inner: what `deepspeed.initialize` made, of a fused optimizer

        names: of the single-device model's parameters, in its order
        """
        self.device = start.device
        self.data_rank, self.data_size = dist.get_rank(), dist.get_world_size()
        self._inner, self._model = inner, inner.module
        self._clock, self._execution = start.clock, execution
        self._optimizer: Any = inner.basic_optimizer
        # Wrapping adds prefixes to names but keeps the order of parameters.
        named = dict(zip(names, self._model.parameters(), strict=True))
        self._stage = inner.zero_optimization_stage()
        self._held: Holding = (
            Cut(inner.optimizer, named) if self._stage else Whole(self._optimizer, named)
        )
        self._coefficient: Tensor | None = None
        # Whether others may have written weights that the network does not have yet.
        self._written = True
        self._set_kernels(skip=torch.ones((), device=self.device))
        self._held.step_on_zeros()

    def parameters(self) -> Mapping[str, Held]:
        return self._held.parameters()

    def optimizer_tensors(self) -> Mapping[str, Held]:
        return self._held.optimizer_tensors()

    def forward_backward(
        self,
        microbatches: Sequence[Batch],
        objective: Objective,
        seed: int,
        step: int,
        global_batch: int,
    ) -> StepResult:
        if self._written:
            self._held.spread()
            self._written = False

        def backward(loss: Tensor) -> None:
            self._inner.backward(loss * (self.data_size / global_batch), scale_wrt_gas=False)

        return over_microbatches(
            microbatches,
            objective,
            seed,
            step,
            clock=self._clock,
            around=self._boundary,
            forward=self._forward,
            backward=backward,
        )

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        with self._clock.phase("gradient_norm"), torch.no_grad():
            norms = torch._foreach_norm(self._held.gradients(), 2.0, dtype=torch.float32)
            square = torch.stack(list(norms)).square().sum().to(self.device)
            if self._held.cut:
                dist.all_reduce(square)
            norm = square.sqrt()
            if max_norm is not None:
                self._coefficient = (max_norm / (norm + EPSILON)).clamp(max=1.0)
            return norm

    def step(self, learning_rate: float, skip: Tensor) -> None:
        with self._clock.phase("optimizer"):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._set_kernels(skip)
            self._inner.step()
            self._coefficient = None

    def sum_over_data(self, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def sum_over_peers(self, values: Tensor) -> Tensor:
        return values.detach().clone()

    def gather_over_data(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(self.data_size)]
        dist.all_gather(parts, values.detach().contiguous())
        return torch.cat(parts)

    @torch.no_grad()
    def run(self, function: Callable[[nn.Module], T], *, whole: bool) -> T:
        self._held.spread()
        self._written = True
        self._model.eval()
        try:
            with self._sampling(whole), computing(self._execution.precision, self.device):
                return function(self._model)
        finally:
            self._model.train()

    def outline(self) -> nn.Module:
        model: nn.Module = self._model
        return model

    def _forward(self, inputs: dict[str, Tensor]) -> Any:
        with computing(self._execution.precision, self.device):
            return self._inner(**inputs)

    @contextmanager
    def _boundary(self, last: bool) -> Iterator[None]:
        """Gradients are ready for a step at the end of the last microbatch's backward alone."""
        self._inner.set_gradient_accumulation_boundary(last)
        yield

    def _set_kernels(self, skip: Tensor) -> None:
        """What the optimizer's kernels multiply gradients by, and whether they leave everything be."""
        place = self._held.device
        scale = self._coefficient
        self._optimizer.grad_scale = None if scale is None else scale.reciprocal().to(place)
        self._optimizer.found_inf = skip.to(place, torch.float32)

    @contextmanager
    def _sampling(self, whole: bool) -> Iterator[None]:
        """Stage 3 gathers as its modules are called, by all ranks alike, or everything beforehand.

        Samples come in many batch sizes; compiling for each would cost more than it saves.
        """
        with ExitStack() as stack:
            if self._execution.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if whole and self._stage == 3:
                stage3 = import_module("deepspeed.runtime.zero.stage3")
                stack.enter_context(stage3.unwrap_model_for_generation(self._inner))
            yield


Initialise = Callable[[Any, torch.optim.Optimizer], Any]


def build(
    model: nn.Module,
    config: Json,
    execution: Execution,
    start: Start,
    initialise: Initialise | None = None,
) -> DeepSpeedEngine:
    """The engine of a `FlowModel` on the meta device, drawn from `seed`; a collective.

    config: what `deepspeed_config.generate` made
    initialise: makes DeepSpeed's engine of a model and its optimizer; None for DeepSpeed's own way
    """
    deepspeed = load(start.device)
    described, stage = cast(FlowModel, model), config["zero_optimization"]["stage"]
    rules = rules_of(described)
    names = [name for name, _ in model.named_parameters()]
    prepare_blocks(model, described.blocks, execution)
    # Groups go by shapes, which stage 3 takes away from the parameters.
    before = list(model.parameters())
    made = require_fused(start.optimizer(list(zip(names, before, strict=True))))
    if stage == 3:
        _cut_one_by_one(deepspeed, model, config, start.device)
    else:
        model.to_empty(device=start.device)
    real = dict(zip(map(id, before), model.parameters(), strict=True))
    for group in made.param_groups:
        group["params"] = [real[id(parameter)] for parameter in group["params"]]
    if initialise is None:
        inner, *_ = deepspeed.initialize(
            model=model, optimizer=made, config=config, dist_init_required=False
        )
    else:
        inner = initialise(model, made)
    engine = DeepSpeedEngine(inner, names, execution, start)
    fill_parameters(engine.parameters(), rules, start.seed)
    described.reset_buffers()
    return engine


def load(device: torch.device) -> ModuleType:
    """The package, told of the device and of the process group that is there already."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = import_module("deepspeed")
    # Else it looks for compilers, and on a CPU compiles collectives in shared memory; gloo's need none.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.utils.logger.setLevel(logging.WARNING)
    old = "`torch.distributed.* is deprecated"  # said once by each of its collectives
    warnings.filterwarnings("ignore", message=old, category=FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _cut_one_by_one(
    deepspeed: ModuleType, model: nn.Module, config: Json, device: torch.device
) -> None:
    """Give parameters memory and cut them, so that never more than one is there in whole."""
    cutter = deepspeed.zero.Init(config_dict_or_path=config)
    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = nn.Parameter(torch.empty_like(parameter, device=device, dtype=dtype))
            module.register_parameter(name, whole)
            cutter._convert_to_zero_parameters([whole])
        for name, buffer in list(module.named_buffers(recurse=False)):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, torch.empty_like(buffer, device=device), persistent)
