"""A mixture of experts against a loop over its experts: forward and backward, one thread.

The loop is the usual one (a module an expert; each gathers the rows that chose it, computes them and adds
them up), with the same weights, the same router and the same choices. It is timed beside the bare matrix
products of the same rows, which no way of ordering the work can avoid. Times are of the processor, not of
the clock on the wall, for there is one thread, and other programs may share its core. The process keeps
freed memory, as it does when it trains; so for the loop.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.models.choice import Routing
from flows.models.mixture import Mixture
from parallel.processes import keep_freed_memory

CHOSEN = 2
GOAL, GOAL_EXPERTS = 2.0, 16  # of the loop's speed, for a layer of so many

# name: (width, hidden width of an expert, samples, tokens of a sample)
SIZES = {
    "dit_moe_digits": (64, 128, 64, 16),
    "DiT-MoE-S/2": (384, 1536, 4, 256),
}


@dataclass(frozen=True)
class Measured:
    """One size at one number of experts.

    mixture, loop, products: median seconds of forward and backward
    difference: largest relative difference of outputs and gradients between mixture and loop
    """

    size: str
    experts: int
    tokens: int
    mixture: float
    loop: float
    products: float
    difference: float

    @property
    def ratio(self) -> float:
        """How often the mixture is done while the loop is once."""
        return self.loop / self.mixture

    @property
    def met(self) -> bool | None:
        """Whether the goal is, None for a layer that has none."""
        return self.ratio >= GOAL if self.experts == GOAL_EXPERTS else None

    @property
    def bound(self) -> float:
        """The ratio of a mixture that did nothing but matrix products."""
        return self.loop / self.products


class Expert(nn.Module):
    """One expert by itself."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up.clone()), nn.Parameter(down.clone())

    def forward(self, x: Tensor) -> Tensor:
        gate, value = F.linear(x, self.up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, self.down)


class Loop(nn.Module):
    """The weights of a mixture, expert after expert."""

    def __init__(self, mixture: Mixture) -> None:
        super().__init__()
        weights = mixture.experts
        self.gate = nn.Parameter(mixture.router.gate.weight.detach().clone())
        pairs = zip(weights.up.detach(), weights.down.detach(), strict=True)
        self.experts = nn.ModuleList(Expert(up, down) for up, down in pairs)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, choice = F.linear(rows, self.gate).softmax(-1).topk(CHOSEN, dim=-1)
        y = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            row, slot = (choice == index).nonzero(as_tuple=True)
            y = y.index_add(0, row, expert(rows[row]) * weight[row, slot, None])
        return y.view_as(x)


def measure(size: str, experts: int, rounds: int) -> Measured:
    """Both ways in turn, `rounds` times after two to warm up."""
    keep_freed_memory()
    width, hidden, samples, tokens = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    mixture = Mixture(width, hidden, 0, Routing(experts, CHOSEN))
    for weight in mixture.parameters():
        nn.init.normal_(weight, 0.0, weight.shape[-1] ** -0.5, generator=generator)
    loop = Loop(mixture)
    x = torch.randn(samples, tokens, width, generator=generator)
    probe = torch.randn(x.shape, generator=generator)

    def run(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> tuple[float, list[Tensor]]:
        module.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        begun = time.process_time()
        y = forward(given)
        (y * probe).sum().backward()
        seconds = time.process_time() - begun
        return seconds, [y.detach(), gradient_of(given)]

    products = _products(samples * tokens, width, hidden, experts)
    times: list[tuple[float, float, float]] = []
    for _ in range(rounds + 2):
        ours, mine = run(mixture, lambda given: mixture(given)[0])
        theirs, others = run(loop, loop)
        times.append((ours, theirs, products()))
    weights = (mixture.router.gate.weight, mixture.experts.up, mixture.experts.down)
    mine += [gradient_of(weight) for weight in weights]
    others += [gradient_of(loop.gate), *_stacked(loop)]
    difference = max(apart(a, b) for a, b in zip(mine, others, strict=True))
    ours, theirs, bare = (statistics.median(column) for column in zip(*times[2:], strict=True))
    return Measured(size, experts, samples * tokens, ours, theirs, bare, difference)


def _products(tokens: int, width: int, hidden: int, experts: int) -> Callable[[], float]:
    """Seconds of the matrix products of forward and backward, all experts with as many rows."""
    count = tokens * CHOSEN // experts
    rows, inner, both = (torch.randn(count, n) for n in (width, hidden, 2 * hidden))
    up, down = torch.randn(experts, 2 * hidden, width), torch.randn(experts, width, hidden)

    def run() -> float:
        begun = time.process_time()
        for one, other in zip(up, down, strict=True):
            _ = rows @ one.T, inner @ other.T  # forward
            _ = rows @ other, both @ one  # gradients of rows
            _ = both.T @ rows, rows.T @ inner  # gradients of weights
        return time.process_time() - begun

    return run


def gradient_of(weight: Tensor) -> Tensor:
    """Raises RuntimeError where a backward left none."""
    if weight.grad is None:
        raise RuntimeError("a weight has no gradient after a backward")
    return weight.grad


def _stacked(loop: Loop) -> list[Tensor]:
    """Gradients of `up` and `down` as the mixture has them."""
    named = [[gradient_of(getattr(one, name)) for one in loop.experts] for name in ("up", "down")]
    return [torch.stack(gradients) for gradients in named]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
