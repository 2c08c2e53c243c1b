"""The protocol between the training loop and whatever moves the model: all that the loop knows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from flows.batch import Batch
from flows.objectives.objective import Objective
from flows.randomness import Draw
from flows.routed import Mixed, Routed, joined
from parallel.clock import Clock
from parallel.pieces import Held

T = TypeVar("T")
OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Start:
    """What every engine begins with.

    seed: that first weights are drawn from
    optimizer: is given canonical names and parameters; it must make a fused optimizer, whose kernels leave
        everything as it is when they are told to skip
    """

    device: torch.device
    seed: int
    optimizer: OptimizerFactory
    clock: Clock


@dataclass(frozen=True)
class StepResult:
    """What one rank saw of one step, before any reduction; nothing here waits for the device.

    loss: (local batch,) loss of each sample, detached
    time: (local batch,) flow time of each sample, or None
    routed: of the networks that have experts, what their routers did with each sample
    """

    loss: Tensor
    time: Tensor | None
    routed: Routed | None = None


class Engine(Protocol):
    """One model over many ranks.

    data_rank, data_size: this rank's place among those that read different samples
    parameters: canonical name -> float32 parameter, as far as this rank holds it; the names are
        those of the single-device model, whatever wraps it. What is written into them before the
        first step, or within the block of a `run`, is what counts from the next `run` or step on.
    """

    device: torch.device
    data_rank: int
    data_size: int

    def parameters(self) -> Mapping[str, Held]: ...

    def optimizer_tensors(self) -> Mapping[str, Held]:
        """`<parameter name>.<slot>` -> optimizer state, placed like the parameter or one number.

        It exists from the start, so loading writes in place.
        """
        ...

    def forward_backward(
        self,
        microbatches: Sequence[Batch],
        objective: Objective,
        seed: int,
        step: int,
        global_batch: int,
    ) -> StepResult:
        """Gradients of (sum of per-sample losses over all ranks) / global_batch, synchronised."""
        ...

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """Scale gradients to `max_norm` (None: leave them); () norm before, alike on all ranks."""
        ...

    def step(self, learning_rate: float, skip: Tensor) -> None:
        """One optimizer step; if the () tensor `skip` is 1, parameters and state stay as they are.

        The gradients are gone afterwards.
        """
        ...

    def sum_over_data(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks that read different samples."""
        ...

    def sum_over_peers(self, values: Tensor) -> Tensor:
        """`values` summed over the ranks that share this rank's samples, itself alone in most layouts."""
        ...

    def gather_over_data(self, values: Tensor) -> Tensor:
        """(ranks that read different samples * n, ...) from the (n, ...) of each, by `data_rank`."""
        ...

    def run(self, function: Callable[[nn.Module], T], *, whole: bool) -> T:
        """`function` of the network in evaluation, without gradients; a collective where it is sharded.

        whole: hold all of the network on every rank meanwhile, so that `function` may call parts of it
            or call it differently often on each rank; otherwise it calls the network itself, on all
            ranks as often
        """
        ...

    def outline(self) -> nn.Module:
        """The modules of the network, alike on all ranks, for what they hold besides parameters.

        What is written into their buffers counts from the next `run` or step on. They are not to be called.
        """
        ...


def over_microbatches(
    microbatches: Sequence[Batch],
    objective: Objective,
    seed: int,
    step: int,
    *,
    clock: Clock,
    around: Callable[[bool], AbstractContextManager[object]],
    forward: Callable[[dict[str, Tensor]], Any],
    backward: Callable[[Tensor], None],
) -> StepResult:
    """Forward and backward of each microbatch, the part of a step that all engines have in common.

    around: the context of a microbatch, which is told whether it is the last
    forward: the network
    backward: is given the () sum of the losses of a microbatch's samples
    """
    losses, times, routed = [], [], []
    for index, batch in enumerate(microbatches):
        with around(index == len(microbatches) - 1):
            with clock.phase("forward"):
                prepared = objective.prepare(batch, Draw(seed, step, batch.position))
                outputs = forward(prepared.inputs)
                loss = objective.loss(outputs, prepared.targets)
            with clock.phase("backward"):
                backward(loss.sum())
        losses.append(loss.detach())
        if isinstance(outputs, Mixed):
            routed.append(outputs.routed)
        if prepared.time is not None:
            times.append(prepared.time)
    time = torch.cat(times) if times else None
    return StepResult(torch.cat(losses), time, joined(routed) if routed else None)


def require_fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer`, if its kernels can be told on the device to skip. Raises TypeError else."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        name = type(optimizer).__name__
        raise TypeError(f"{name} cannot skip a step without waiting; construct it with fused=True")
    return optimizer
