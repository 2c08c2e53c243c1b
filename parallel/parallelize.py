"""From a model on the meta device to one that lies over the ranks, in the order that matters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from flows.initialise import Initialisable, rules_of
from parallel.activation import checkpoint_blocks
from parallel.fsdp import replicate_model, shard_model
from parallel.initialise import fill_parameters
from parallel.mesh import Layout
from parallel.precision import Precision, gather_policy


class FlowModel(Initialisable, Protocol):
    """What a model of `flows` says about itself, besides being an `nn.Module`.

    blocks: its repeated part, the unit of recomputing, compiling and cutting
    """

    @property
    def blocks(self) -> Sequence[nn.Module]: ...


@dataclass(frozen=True)
class ParallelModel:
    """One model over the ranks.

    bare: the model itself; sampling calls this
    trained: what a training step calls, which keeps gradients the same on all ranks
    parameters: single-device name -> parameter, a DTensor where it is cut
    """

    bare: nn.Module
    trained: nn.Module
    parameters: dict[str, nn.Parameter]


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    layout: Layout,
    *,
    device: torch.device,
    seed: int,
    precision: Precision,
    checkpoint_activations: int,
    compile: bool,
    reshard_after_forward: bool,
) -> ParallelModel:
    """Lay `model` (a FlowModel on the meta device) over `mesh`; it is changed in place.

    Recomputing goes inside compiling, so that the compiler sees both; both go inside the gather of
    a block, so that its weights are there for either; and weights are drawn when everyone knows
    what they hold.
    """
    described = cast(FlowModel, model)
    rules = rules_of(described)
    names = [name for name, _ in model.named_parameters()]

    checkpoint_blocks(model, described.blocks, checkpoint_activations)
    if compile:
        for block in described.blocks:
            block.compile(fullgraph=True)
    if layout.strategy in ("fsdp", "hsdp"):
        shard_model(
            model,
            described.blocks,
            mesh,
            layout,
            policy=gather_policy(precision),
            reshard_after_forward=reshard_after_forward,
        )
    model.to_empty(device=device)
    # Wrapping adds prefixes to names but keeps the order of parameters.
    parameters = dict(zip(names, model.parameters(), strict=True))
    fill_parameters(parameters, rules, seed)
    described.reset_buffers()
    trained = replicate_model(model, mesh) if layout.strategy == "ddp" else model
    return ParallelModel(model, trained, parameters)
