"""Initial weights as pure functions of (seed, parameter name, element index).

A rank draws its own piece of a parameter and nothing else, and all ranks together hold the weights
that one device would hold, whatever the cut.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from flows.randomness import normal_runs, uniform_runs

# Numbers drawn at a time: the working memory is about 60 bytes for each.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 22}


@dataclass(frozen=True)
class Rule:
    """How a parameter starts; scale is the standard deviation, the bound or the value."""

    kind: Literal["normal", "uniform", "constant"]
    scale: float

    @staticmethod
    def normal(std: float) -> "Rule":
        return Rule("normal", std)

    @staticmethod
    def uniform(bound: float) -> "Rule":
        """Uniform in (-bound, bound)."""
        return Rule("uniform", bound)

    @staticmethod
    def constant(value: float) -> "Rule":
        return Rule("constant", value)


def xavier_uniform(fan_in: int, fan_out: int) -> Rule:
    """Glorot and Bengio 2010, eq. 16: keeps the variance of activations and of gradients."""
    return Rule.uniform(math.sqrt(6.0 / (fan_in + fan_out)))


class Initialisable(Protocol):
    """A model that says how it starts."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> rule, one for every parameter."""
        ...

    def reset_buffers(self) -> None:
        """Recompute buffers that no checkpoint holds, in place."""
        ...


def initialise(model: Initialisable, seed: int) -> None:
    """Fill every parameter of a single-device model in place and recompute its buffers.

    Raises ValueError naming the parameters without a rule or the rules without a parameter.
    """
    rules = rules_of(model)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        origin = (0,) * parameter.dim()
        local = parameter.detach()
        fill_(local, rules[name], seed=seed, name=name, global_shape=shape, offset=origin)
    model.reset_buffers()


def rules_of(model: Initialisable) -> dict[str, Rule]:
    """`model.init_rules()`, after a check that it speaks of every parameter and of no other."""
    rules = model.init_rules()
    names = {name for name, _ in model.named_parameters()}
    without_rule, without_parameter = names - rules.keys(), rules.keys() - names
    if without_rule or without_parameter:
        raise ValueError(
            f"{type(model).__name__}.init_rules() must name every parameter once: "
            f"no rule for {sorted(without_rule)}, no parameter for {sorted(without_parameter)}"
        )
    return rules


@torch.no_grad()
def fill_(
    tensor: Tensor,
    rule: Rule,
    *,
    seed: int,
    name: str,
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
) -> None:
    """Fill the piece of a parameter that lies at `offset` inside the whole of `global_shape`.

    tensor: the piece, of any shape that fits, also an empty one
    name: the parameter's canonical name: it keys the numbers
    Raises ValueError if the piece leaves the whole.
    """
    if tensor.numel() == 0:
        return
    ends = [start + size for start, size in zip(offset, tensor.shape, strict=True)]
    if any(s < 0 or e > n for s, e, n in zip(offset, ends, global_shape, strict=True)):
        raise ValueError(
            f"{name}: a piece of shape {tuple(tensor.shape)} at {offset} leaves {global_shape}"
        )
    if rule.kind == "constant":
        tensor.fill_(rule.scale)
        return
    if not tensor.is_contiguous():
        piece = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        fill_(piece, rule, seed=seed, name=name, global_shape=global_shape, offset=offset)
        tensor.copy_(piece)
        return
    starts, length = _runs(tuple(tensor.shape), global_shape, offset, tensor.device)
    rows = tensor.view(len(starts), length)
    for i, j in _chunks(len(starts), length, CHUNK.get(tensor.device.type, CHUNK["cpu"])):
        block = rows[i, j]
        block.copy_(_numbers(rule, seed, name, starts[i] + j.start, block.shape[1]))


def _numbers(rule: Rule, seed: int, name: str, start: Tensor, count: int) -> Tensor:
    if rule.kind == "normal":
        return normal_runs(seed, name, start, count).mul_(rule.scale)
    return uniform_runs(seed, name, start, count).mul_(2.0).sub_(1.0).mul_(rule.scale)


def _runs(
    shape: tuple[int, ...],
    global_shape: tuple[int, ...],
    offset: tuple[int, ...],
    device: torch.device,
) -> tuple[Tensor, int]:
    """(runs,) int64 where the runs of a piece start in the flattened whole, and their length."""
    starts = torch.zeros(1, dtype=torch.int64, device=device)
    # Trailing dimensions that are whole, and the first that is not, make one run.
    depth = len(shape)
    while depth > 0 and shape[depth - 1] == global_shape[depth - 1]:
        depth -= 1
    depth = max(depth - 1, 0)
    for d, stride in enumerate(_strides(global_shape)):
        place = torch.arange(shape[d] if d < depth else 1, device=device)
        starts = (starts[:, None] + (place + offset[d]) * stride).flatten()
    return starts, math.prod(shape[depth:])


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[d + 1 :]) for d in range(len(shape))]


def _chunks(rows: int, columns: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of at most `size` elements that cover a matrix."""
    width = min(columns, size)
    height = size // width
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))
