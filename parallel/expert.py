"""Expert parallelism: the ranks of `ep` have some experts each, and tokens travel to those they chose.

`ep` lies within the ranks that one copy of the model is cut over (`shard` x `cp`): each reads its own
samples and routes its own tokens. Before the experts, rows go to the ranks that have their experts, after
them they come back, in one exchange with uneven parts each way (GShard, Lepikhin et al. 2021); backwards
the same ways. All else of the model is cut as without.

An expert's gradient is that of all tokens of the group at once, for they have all been computed by the
one rank that has it; so it is summed over the other copies of the expert and divided by the number of all
ranks that everything else is averaged over. What a rank has of experts is cut once more over the
`shard` x `cp` / `ep` ranks that have the same experts (FSDP2), each copy of the model for itself (HSDP).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from flows.errors import UserError
from flows.models.mixture import Compute, Experts, Meanwhile
from flows.models.routers import Reach, routers_of
from parallel.exchange import send_rows_off, send_to_each
from parallel.mesh import AXES, Layout, divisors
from parallel.pieces import Cut
from parallel.regions import all_reduce

AXIS = "ep"
WITHIN = "expert_shard"


@dataclass(frozen=True)
class Scattered:
    """The experts of a model, over the ranks.

    cuts: name of a parameter -> how it is cut over `ep`
    modules: those that hold them
    mesh: what each is cut over besides, as FSDP takes it
    within: how many ranks that is in one copy of the model
    divisor: of their gradients' sum over that mesh
    """

    cuts: dict[str, Cut]
    modules: tuple[Experts, ...]
    mesh: DeviceMesh | None
    within: int
    divisor: int

    def finish(self) -> None:
        """After FSDP has cut them: gradients are divided as those of everything else."""
        for module in self.modules:
            cut = cast(FSDPModule, module)
            cut.set_gradient_divide_factor(float(self.divisor))
            # Not every backend of collectives can divide before it sums. A group of one sums nothing,
            # and torch 2.13 would divide twice there.
            cut.set_force_sum_reduction_for_comms(self.within > 1)


NOTHING = Scattered({}, (), None, 1, 1)


def check_routing(model: nn.Module, layout: Layout) -> None:
    """Raise UserError for routers that need what ranks of this layout do not have."""
    found = [router.routing for router in routers_of(model)]
    if found and layout.sequence:
        raise UserError(
            "parallel.sequence = true cuts tokens over parallel.tp, which routers of experts do not know "
            "of; use parallel.sequence=false."
        )
    for routing in found[:1] if layout.cp > 1 else []:
        counted = routing.capacity > 0 or routing.chooser == "experts"
        if counted:
            key = "chooser = experts" if routing.chooser == "experts" else "capacity"
            raise UserError(
                f"parallel.cp = {layout.cp} cuts sequences, and model.{key} compares all tokens of one; use "
                "parallel.cp=1, or model.capacity=0 with model.chooser=tokens."
            )


def widen_routers(model: nn.Module, group: ProcessGroup) -> None:
    """Let routers that see a rank's share of the tokens speak of all of them, in place.

    Gradients are averaged over `group` afterwards, as context parallelism does.
    """
    reach = Reach(partial(mean_over_ranks, group=group), partial(all_reduce, group=group))
    for router in routers_of(model):
        router.reach = reach


def mean_over_ranks(own: Tensor, group: ProcessGroup) -> Tensor:
    """The mean of everybody's `own`; backwards, the gradient as it is, for it will be averaged."""
    result: Tensor = _Mean.apply(own, group)
    return result


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:  # noqa: ARG004
        return all_reduce(own, group) / dist.get_world_size(group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None


def check_experts(model: nn.Module, ep: int, *, family: str, compiled: bool) -> None:
    """Raise UserError unless `ep` ranks can have as many experts each; opens no process group.

    family: the model's, as a recipe names it
    """
    if compiled:
        raise UserError(
            f"train.compile = true compiles whole blocks, and with parallel.ep = {ep} the host asks within "
            "one how many tokens travel; set train.compile=false, or parallel.ep=1."
        )
    counts = {module.count for module in model.modules() if isinstance(module, Experts)}
    if not counts:
        raise UserError(
            f"parallel.ep = {ep} divides experts, and model.family = {family} has none; use parallel.ep=1, "
            "or model.family=dit_moe."
        )
    for count in counts:
        if count % ep:
            raise UserError(
                f"parallel.ep = {ep} does not divide model.experts = {count}; use parallel.ep = "
                f"{divisors(count)}, or another number of experts."
            )


def scatter_experts(model: nn.Module, axes: DeviceMesh, layout: Layout) -> Scattered:
    """Leave each rank its experts of a model on the meta device, in place, and let tokens travel.

    model: or a part of one, with the parameters of some experts alone
    axes: an `expert_mesh`
    """
    group = axes.get_group(AXIS)
    index = axes.get_local_rank(AXIS)
    cuts: dict[str, Cut] = {}
    modules = []
    for path, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        held = list(module.named_parameters(recurse=False))
        for name, weight in held:
            cut = Cut(weight.shape, 0, (len(weight),), index, layout.ep, group)
            local = torch.empty(cut.local_shape, dtype=weight.dtype, device=weight.device)
            setattr(module, name, nn.Parameter(local))
            cuts[f"{path}.{name}"] = cut
        if held:
            module.exchange = partial(with_other_ranks, group=group)
            modules.append(module)
    copies = ("replicate", WITHIN) if layout.strategy == "hsdp" else (WITHIN,)
    divisor = layout.replicate * layout.shard * layout.cp
    return Scattered(cuts, tuple(modules), axes[copies], axes[WITHIN].size(), divisor)


def expert_mesh(mesh: DeviceMesh, layout: Layout) -> DeviceMesh:
    """The ranks of `mesh` with `shard` x `cp` divided otherwise: neighbours have different experts.

    A collective over all ranks.
    """
    within = layout.shard * layout.cp // layout.ep
    sizes = (layout.pp, layout.replicate, within, layout.ep, layout.tp)
    assert mesh.mesh_dim_names == AXES
    return DeviceMesh(
        mesh.device_type,
        mesh.mesh.reshape(sizes),
        mesh_dim_names=("pp", "replicate", WITHIN, AXIS, "tp"),
    )


def with_other_ranks(
    compute: Compute, rows: Tensor, counts: Tensor, meanwhile: Meanwhile, *, group: ProcessGroup
) -> tuple[Tensor, Tensor | None]:
    """`compute` of rows that travel to the ranks of their experts and back.

    rows: (slots, width) in the order of all experts, counts: (experts,) rows of each
    meanwhile: done while they travel there
    """
    ranks = dist.get_world_size(group)
    sent = counts.view(ranks, -1)
    arriving = send_to_each(sent, group)
    # The sizes of messages are the host's business: it waits here for what it has sent.
    sending, receiving = torch.stack((sent.sum(1), arriving.sum(1))).tolist()
    travelling = send_rows_off(rows, sending, receiving, group)
    order, aside = _by_expert(arriving, sum(receiving)), meanwhile()
    arrived = travelling.arrived()
    outputs = compute(arrived.index_select(0, order), arriving.sum(0))
    back = outputs.index_select(0, order.argsort())
    return send_rows_off(back, receiving, sending, group).arrived(), aside


def _by_expert(arriving: Tensor, rows: int) -> Tensor:
    """(rows,) the order by experts of rows that lie by (rank they are from, expert).

    rows: the sum of `arriving`, which a device would be asked for otherwise
    """
    ranks, experts = arriving.shape
    own = torch.arange(experts, device=arriving.device).repeat(ranks)
    return own.repeat_interleave(arriving.flatten(), output_size=rows).argsort(stable=True)
