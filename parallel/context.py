"""Context parallelism: the ranks of `cp` hold parts of each sequence, and meet in attention.

In a model's regions a rank has its share of the tokens; outside of them all ranks of the axis compute
alike, the loss too. Weights are whole everywhere and their gradients averaged over these ranks, see
`parallel.regions` for what that asks of a cut and a gather.

How tokens are cut: in equal runs, in order, of every part of the sequence ([text | image]: a rank has
some of the text, then some of the image); for a ring over a causal chain in zigzag. A chain that does
not divide is made longer at its end, which nothing before it sees, by zeros that the gather drops, so
that nothing changes: TarFlow predicts one token less than an image has. Where every token sees every
token the added ones would be seen, so lengths that do not divide are refused. A flow that reads its
chain backwards turns it round outside of the region, between a gather and a cut.
"""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from flows.errors import UserError
from flows.models.attention import Kernel, see_before
from flows.models.division import Region
from parallel.mesh import Context, divisors
from parallel.regions import Deal, gather_summed
from parallel.ring import ring_attention
from parallel.tensor import Divisible
from parallel.ulysses import ulysses_attention


class Attending(Protocol):
    """A module of a model that mixes tokens."""

    kernel: Kernel


def check_context(model: nn.Module, cp: int, way: Context, tp: int) -> None:
    """Raise UserError unless sequences and heads of a model can be cut; opens no process group."""
    regions = cast(Divisible, model).regions()
    tokens = {k: n for region in regions if not region.causal for k, n in region.parts.items()}
    heads = {k: n for region in regions for k, n in region.heads.items() if way == "ulysses"}
    # What fits one of them fits all; there may be none.
    fits = divisors(math.gcd(*tokens.values(), *(count // tp for count in heads.values())) or 1)
    for key, count in tokens.items():
        if count % cp:
            raise UserError(
                f"parallel.cp = {cp} does not divide {key} = {count} tokens; use {fits}, or another number "
                "of tokens."
            )
    for key, count in heads.items():
        if count % (tp * cp):
            over = f"parallel.cp = {cp}" if tp == 1 else f"parallel.tp x cp = {tp} x {cp}"
            raise UserError(
                f"{over} does not divide {key} = {count}, and parallel.context = ulysses gives each rank "
                f"whole heads; use parallel.cp={fits}, or parallel.context=ring."
            )


def cut_sequences(
    model: nn.Module, regions: Sequence[Region], group: ProcessGroup, way: Context
) -> None:
    """Change a model in place: in its regions tokens are cut, attended over all ranks, gathered."""
    for region in regions:
        deal = Deal(
            region.sizes,
            dist.get_rank(group),
            dist.get_world_size(group),
            group,
            zigzag=region.causal and way == "ring",
        )
        for name in region.blocks:
            block = model.get_submodule(name)
            for module in block.modules():
                if hasattr(module, "kernel"):
                    attending = cast(Attending, module)
                    attending.kernel = shared_kernel(attending.kernel, way, group)
            places = _places(block, first=name == region.blocks[0])
            # Before what was registered earlier: that may cut this rank's tokens further.
            block.register_forward_pre_hook(partial(_share_arguments, deal, places), prepend=True)
        for path in region.lengths:
            name, _, attribute = path.rpartition(".")
            module = model.get_submodule(name)
            setattr(module, attribute, getattr(module, attribute) // deal.count)
        for name in region.ends:
            model.get_submodule(name).register_forward_hook(partial(_gather_result, deal))


def shared_kernel(kernel: Kernel, way: Context, group: ProcessGroup) -> Kernel:
    """What does over the tokens of all ranks what `kernel` does over those of one."""
    if way == "ulysses":
        return partial(ulysses_attention, kernel=kernel, group=group)
    return partial(ring_attention, causal=kernel is see_before, group=group)


def _places(block: nn.Module, *, first: bool) -> list[tuple[int, int]]:
    """(position, dimension) of the arguments of a block that speak of all tokens."""
    names = list(inspect.signature(block.forward).parameters)
    dims = {"turn": 1, "mask": -1, "output_mask": 1}
    found = [(names.index(name), dim) for name, dim in dims.items() if name in names]
    return [(0, 1), *found] if first else found


def _share_arguments(
    deal: Deal, places: list[tuple[int, int]], _block: nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    changed = list(arguments)
    for position, dim in places:
        if position < len(changed) and changed[position] is not None:
            changed[position] = deal.share(changed[position], dim)
    return tuple(changed)


def _gather_result(deal: Deal, _module: nn.Module, _arguments: object, result: Tensor) -> Tensor:
    return gather_summed(result, deal)
