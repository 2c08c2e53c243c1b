"""From a model on the meta device to one that lies over the ranks, in the order that matters."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flows.initialise import Initialisable, rules_of
from flows.models.division import Region
from parallel.context import cut_sequences
from parallel.execution import Execution, prepare_blocks
from parallel.expert import NOTHING, expert_mesh, scatter_experts, widen_routers
from parallel.fsdp import replicate_model, shard_model
from parallel.initialise import fill_parameters
from parallel.mesh import Layout, averaging_mesh
from parallel.pieces import Cut, Slice, whole_tensor
from parallel.precision import gather_policy
from parallel.tensor import Divided, divide


class FlowModel(Initialisable, Protocol):
    """What a model of `flows` says about itself, besides being an `nn.Module`.

    blocks: its repeated part, the unit of recomputing, compiling and cutting
    """

    @property
    def blocks(self) -> Sequence[nn.Module]: ...

    def regions(self) -> Sequence[Region]:
        """Where its tokens may be divided."""
        ...


@dataclass(frozen=True)
class ParallelModel:
    """One model over the ranks.

    bare: the model itself; sampling calls this
    trained: what a training step calls, which keeps gradients the same on all ranks
    parameters: single-device name -> parameter, a DTensor where it is cut over data ranks
    cuts: single-device name -> how it is cut besides, for those parameters that are
    partial: names of parameters whose gradients are to be summed over `tp`
    single: the model as one device has it, on the meta device; None where `bare` can be held whole
    """

    bare: nn.Module
    trained: nn.Module
    parameters: dict[str, nn.Parameter]
    cuts: dict[str, Cut]
    partial: tuple[str, ...] = ()
    single: nn.Module | None = None

    def placed(self, name: str, tensor: Tensor) -> Tensor | Slice:
        """A tensor that lies over the ranks as parameter `name` does."""
        return Slice(tensor, self.cuts[name]) if name in self.cuts else tensor

    @property
    def held(self) -> dict[str, Tensor | Slice]:
        """The parameters, as parts of whole ones."""
        return {name: self.placed(name, value) for name, value in self.parameters.items()}

    def copy(self, device: torch.device) -> nn.Module:
        """The model as one device has it, with the weights of now; a collective."""
        assert self.single is not None
        copy = deepcopy(self.single).to_empty(device=device)
        with torch.no_grad():
            for name, parameter in copy.named_parameters():
                parameter.copy_(whole_tensor(self.placed(name, self.parameters[name])))
            for own, buffer in zip(copy.buffers(), self.bare.buffers(), strict=True):
                own.copy_(buffer)
        return copy


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    layout: Layout,
    execution: Execution,
    *,
    device: torch.device,
    seed: int,
) -> ParallelModel:
    """Lay `model` (a FlowModel on the meta device) over `mesh` and draw its weights; changed in place.

    Weights are drawn when everyone knows what they hold.
    """
    described = cast(FlowModel, model)
    rules = rules_of(described)
    laid_out = lay_out(model, mesh, layout, execution)
    _materialise(model, device, torch.device("cpu") if execution.offload else device)
    parameters = dict(zip(laid_out.parameters, model.parameters(), strict=True))
    laid_out = replace(laid_out, parameters=parameters)
    fill_parameters(laid_out.held, rules, seed)
    described.reset_buffers()
    if layout.strategy == "ddp":
        return replace(laid_out, trained=replicate_model(model, averaging_mesh(mesh, layout)))
    return laid_out


def lay_out(
    model: nn.Module, mesh: DeviceMesh, layout: Layout, execution: Execution
) -> ParallelModel:
    """What each rank will hold of `model`, still on the meta device.

    The work on a sample is divided first, so that all that follows sees the model that a rank has.
    Recomputing and compiling go inside the gather of a block, so that its weights are there for either.
    """
    described = cast(FlowModel, model)
    names = [name for name, _ in model.named_parameters()]
    single = deepcopy(model) if layout.tp * layout.cp * layout.ep > 1 else None

    divided = share_work(model, mesh, layout)
    experts = NOTHING
    if layout.ep > 1:
        experts = scatter_experts(model, expert_mesh(mesh, layout), layout)
    prepare_blocks(model, described.blocks, execution)
    if layout.strategy in ("fsdp", "hsdp"):
        shard_model(
            model,
            described.blocks,
            averaging_mesh(mesh, layout),
            policy=gather_policy(execution.precision),
            reshard_after_forward=execution.reshard_after_forward,
            offload=execution.offload,
            apart=experts.modules,
            apart_mesh=experts.mesh,
        )
        experts.finish()
    # Wrapping adds prefixes to names but keeps the order of parameters.
    parameters = dict(zip(names, model.parameters(), strict=True))
    cuts = divided.cuts | experts.cuts
    return ParallelModel(model, model, parameters, cuts, divided.partial, single)


def share_work(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> Divided:
    """Let ranks of `tp` and `cp` share the work on each sample; `model`, on meta, is changed in place."""
    divided = Divided({}, ())
    if layout.tp > 1:
        divided = divide(model, mesh.get_group("tp"), layout)
    if layout.cp > 1:
        regions = cast(FlowModel, model).regions()
        cut_sequences(model, regions, mesh.get_group("cp"), layout.context)
        widen_routers(model, mesh.get_group("cp"))
    return divided


def _materialise(model: nn.Module, device: torch.device, home: torch.device) -> None:
    """Give parameters memory at `home`, and buffers where they are used."""
    model.to_empty(device=home)
    if home != device:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=device))
