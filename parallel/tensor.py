"""Tensor parallelism: the ranks of `tp` share each matrix product, as a model's divisions say.

It is Megatron-LM's (Shoeybi et al. 2019), on plain tensors: a layer's weight becomes this rank's rows
(column) or columns (row), each run of outputs or inputs by itself, and hooks put the sums around each pair.
With sequence parallelism (Korthikanti et al. 2022) tokens between pairs are divided as well, and the sums
become gathers and scatters of the same bytes, see `parallel.regions`.

All else is whole on every rank, and has equal gradients there, but for what is applied to a share of the
work alone: the norms of heads, and within sequence parallelism whatever is applied to tokens. Those
gradients are summed over the ranks once a step (`parallel.gradients.sum_partial`).

What is sent is in `pair_bytes`, for every pair of layers: attention and feed-forward are one each.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from flows.errors import UserError
from flows.models.division import Division, Region
from parallel.exchange import in_dtype_of_products
from parallel.mesh import Layout, divisors
from parallel.pieces import Cut
from parallel.regions import Deal, copied, gather, gather_summed, reduced, scattered, split

Change = Callable[[Tensor], Tensor]


class Divisible(Protocol):
    """A model that says where its tokens may be divided."""

    def regions(self) -> Sequence[Region]: ...


@dataclass(frozen=True)
class Divided:
    """What became of a model's parameters.

    cuts: name -> how it is cut
    partial: names of those that are whole, with gradients of a share of the work
    """

    cuts: dict[str, Cut]
    partial: tuple[str, ...]


class Row(nn.Linear):
    """A linear layer of which a rank has some inputs.

    join: the sum over ranks, to which the bias is added once
    """

    join: Change

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, local inputs) -> (batch, tokens, outputs), or the rank's tokens of it."""
        result = self.join(F.linear(x, self.weight))
        return result if self.bias is None else result + self.bias.to(result.dtype)


def check_division(model: nn.Module, layout: Layout) -> None:
    """Raise UserError unless the ranks of `tp` can share the work of a model; opens no process group."""
    tp, cp = layout.tp, layout.cp
    counts = {
        what: count
        for _, _, division in _divisions(model)
        for what, count in division.divisible.items()
        if count % tp
    }
    if counts:
        every = [n for _, _, division in _divisions(model) for n in division.divisible.values()]
        found = " and ".join(f"{what} = {count}" for what, count in counts.items())
        raise UserError(
            f"parallel.tp = {tp} does not divide the model's {found}; use parallel.tp = "
            f"{divisors(math.gcd(*every))}, or another width."
        )
    if not layout.sequence:
        return
    for region in cast(Divisible, model).regions():
        for key, tokens in region.parts.items():
            if not region.causal and tokens // cp % tp:
                raise UserError(
                    f"parallel.sequence = true cuts {key} = {tokens} tokens over parallel.cp x tp = {cp} x "
                    f"{tp} ranks, which does not come out even; use parallel.tp = "
                    f"{divisors(tokens // cp)}, or parallel.sequence=false."
                )


def pair_bytes(activation: int, ranks: int) -> int:
    """Bytes that a rank sends in a step for one pair of divided layers, with or without `sequence`.

    A sum forward and one backward, of which a ring sends 2 (n - 1) / n each; or, tokens being divided, a
    gather and a scatter both ways, of which it sends half as much each. A recomputed block has its
    forward ones twice.

    activation: bytes of the layers' input, samples x tokens x width x bytes of a number
    """
    return 4 * activation * (ranks - 1) // ranks


def count_shared(model: nn.Module, tp: int) -> int:
    """Numbers in the parameters that one of `tp` ranks holds."""
    spared = sum(
        parameter.numel() * (tp - 1) // tp
        for _, module, division in _divisions(model)
        for name, layer in division.layers.items()
        for own, parameter in module.get_submodule(name).named_parameters()
        if own == "weight" or layer.kind == "column"
    )
    return sum(parameter.numel() for parameter in model.parameters()) - spared


def divide(model: nn.Module, group: ProcessGroup, layout: Layout) -> Divided:
    """Cut the matrix products of a model on the meta device over `group`, in place.

    Under `layout.sequence` also the tokens between them, those of its share that a rank of `cp` has.
    """
    check_division(model, layout)
    ways = Ways(group, _token_deals(model, group, layout) if layout.sequence else [])
    cuts: dict[str, Cut] = {}
    shared: list[str] = []
    for path, module, division in list(_divisions(model)):
        cuts |= _cut_layers(path, module, division, ways)
        for name in division.attributes:
            setattr(module, name, _local(getattr(module, name), ways.count))
        for name in division.enters:
            place = f"{path}.{name}" if name else path
            module.get_submodule(name).register_forward_pre_hook(
                partial(_change_first, ways.enter(place))
            )
        within = tuple(f"{path}.{name}." for name in division.shared)
        shared += [
            name
            for own, _ in module.named_parameters()
            if (name := f"{path}.{own}").startswith(within)
        ]
    for region, deal in ways.deals:
        shared += _divide_tokens(model, region, deal)
    whole = [name for name in dict.fromkeys(shared) if name not in cuts]
    return Divided(cuts, tuple(whole))


@dataclass(frozen=True)
class Ways:
    """How activations travel between the ranks of `group`.

    deals: for each region how its tokens are dealt out; none if they are not
    """

    group: ProcessGroup
    deals: list[tuple[Region, Deal]]

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group)

    def enter(self, path: str) -> Change:
        """Into the first layer of a pair, in the module `path`."""
        deal, group = self._deal(path), self.group

        def change(x: Tensor) -> Tensor:
            (x,) = in_dtype_of_products(x)  # as the layer would, but before it travels
            return copied(x, group) if deal is None else gather_summed(x, deal)

        return change

    def leave(self, path: str) -> Change:
        """Out of the second layer of a pair."""
        deal = self._deal(path)
        return partial(reduced, group=self.group) if deal is None else partial(scattered, deal=deal)

    def _deal(self, path: str) -> Deal | None:
        """Of the tokens that a module sees."""
        for region, deal in self.deals:
            if _inside(path, region.blocks):
                for name, part in region.part_of.items():
                    if _inside(path, (name,)):
                        return Deal((deal.parts[part],), deal.index, deal.count, deal.group)
                return deal
        return None


def _divisions(model: nn.Module) -> Iterator[tuple[str, nn.Module, Division]]:
    """(name, module, how it is divided) of all modules that say so."""
    for path, module in model.named_modules():
        describe: Callable[[], Division] | None = getattr(module, "division", None)
        if describe is not None:
            yield path, module, describe()


def _cut_layers(path: str, module: nn.Module, division: Division, ways: Ways) -> dict[str, Cut]:
    """Leave this rank's shares of the layers of a module in place; parameter name -> how it is cut."""
    cuts, index = {}, dist.get_rank(ways.group)
    for own, layer in division.layers.items():
        name, linear = f"{path}.{own}", cast(nn.Linear, module.get_submodule(own))
        dim = 0 if layer.kind == "column" else 1
        for kind, parameter in linear.named_parameters():
            if dim < parameter.dim():
                cut = Cut(
                    parameter.shape, dim, layer.stretches, index, ways.count, group=ways.group
                )
                cuts[f"{name}.{kind}"] = cut
                setattr(linear, kind, nn.Parameter(parameter.new_empty(cut.local_shape)))
        if layer.kind == "row":
            linear.in_features //= ways.count
            linear.__class__ = Row
            cast(Row, linear).join = ways.leave(name)
        else:
            linear.out_features //= ways.count
    return cuts


def _token_deals(
    model: nn.Module, group: ProcessGroup, layout: Layout
) -> list[tuple[Region, Deal]]:
    """For each region how its tokens, or those that this rank of cp has, are dealt out."""
    index, count = dist.get_rank(group), dist.get_world_size(group)
    deals = []
    for region in cast(Divisible, model).regions():
        zigzag = region.causal and layout.context == "ring"
        before = Deal(region.sizes, 0, layout.cp, group, zigzag=zigzag)
        deals.append((region, Deal(before.local_parts, index, count, group)))
    return deals


def _divide_tokens(model: nn.Module, region: Region, deal: Deal) -> list[str]:
    """Put the hooks around a region; the parameters within that are applied to some tokens alone."""

    def on_result(change: Change, name: str) -> None:
        model.get_submodule(name).register_forward_hook(partial(_change_result, change))

    first = model.get_submodule(region.blocks[0])
    first.register_forward_pre_hook(partial(_change_first, partial(split, deal=deal)))
    for name in region.ends:
        on_result(partial(gather, deal=deal), name)
    for name in region.vectors:
        on_result(partial(copied, group=deal.group), name)
    for name in region.lengths:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        setattr(module, attribute, _local(getattr(module, attribute), deal.count))
    inside = (*region.blocks, *region.after)
    return [
        name
        for name, _ in model.named_parameters()
        if _inside(name, inside) and not _inside(name, region.vectors)
    ]


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _local(count: Any, ranks: int) -> Any:
    """A number of heads or features, or a list of them, as one rank has them."""
    return [each // ranks for each in count] if isinstance(count, list) else count // ranks


def _change_first(
    change: Change, _module: nn.Module, arguments: tuple[Any, ...]
) -> tuple[Any, ...]:
    first, *rest = arguments
    return (change(first), *rest)


def _change_result(
    change: Change, _module: nn.Module, _arguments: object, result: Tensor
) -> Tensor:
    return change(result)
