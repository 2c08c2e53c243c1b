"""Experts over ranks against `deepspeed.moe`: forward and backward of one layer, step by step in turn.

Both have the same weights, router and tokens. Tokens are made so that every expert gets as many, for
DeepSpeed computes all places of every expert, taken or not: so neither side multiplies more than the
other, and none drops a token. Outputs and gradients are compared before anything is timed.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.experts import CHOSEN, SIZES, Expert, apart, gradient_of
from flows.errors import UserError
from flows.models.choice import Routing
from flows.models.mixture import Mixture
from parallel.engines import deepspeed
from parallel.expert import expert_mesh, scatter_experts
from parallel.mesh import build_mesh, resolve_layout
from parallel.processes import Ranks

GOAL = 1.2  # of DeepSpeed's speed
LARGEST_DIFFERENCE = 1e-5
# How far the logit of a token's first choice lies above that of its second, and that above the others.
STEP = 3.0


@dataclass(frozen=True)
class Exchanged:
    """One size at one number of experts.

    ours, theirs: median seconds of forward and backward
    ratio: median over the rounds of their time over ours
    difference: largest relative difference of outputs and gradients
    """

    size: str
    experts: int
    tokens: int
    ours: float
    theirs: float
    ratio: float
    difference: float

    @property
    def met(self) -> bool:
        """Whether the goal is."""
        return self.ratio >= GOAL


@dataclass(frozen=True)
class Side:
    """One way to compute the layer, and where its gradients are."""

    forward: Callable[[Tensor], Tensor]
    module: nn.Module
    gradients: Callable[[], list[Tensor]]


def check_installed() -> None:
    """Raises UserError where DeepSpeed is not."""
    if find_spec("deepspeed") is None:
        raise UserError(
            "deepspeed is not installed, which experts over ranks are compared with; "
            'pip install "flowmill[deepspeed]"'
        )


def check_shares(counts: Sequence[int], ranks: int) -> None:
    """Raises UserError for numbers of experts that cannot be shared equally by ranks and tokens."""
    for experts in counts:
        for size, (width, _, samples, tokens) in SIZES.items():
            if experts % ranks or samples * tokens % experts or experts > width:
                raise UserError(
                    f"--count {experts} of a layer of {size} cannot be shared equally by {ranks} ranks "
                    f"and its {samples * tokens} tokens; use a multiple of {ranks} that is a power of "
                    f"two, at most {width}"
                )


def exchange(ranks: Ranks, size: str, experts: int, rounds: int) -> Exchanged:
    """Both sides `rounds` times after two to warm up; a collective, the same result on every rank.

    Raises RuntimeError if the sides compute different things.
    """
    width, hidden, samples, tokens = SIZES[size]
    whole = Mixture(width, hidden, 0, Routing(experts, CHOSEN, renormalise=True))
    generator = torch.Generator().manual_seed(0)
    for weight in (whole.experts.up, whole.experts.down):
        nn.init.normal_(weight, 0.0, weight.shape[-1] ** -0.5, generator=generator)
    with torch.no_grad():
        whole.router.gate.weight.copy_(torch.eye(experts, width))
    x = balanced(samples, tokens, width, experts, seed=ranks.rank)
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(ranks.rank))
    sides = _theirs(whole, ranks), _ours(whole, ranks)
    theirs, ours = (_run(side, x, probe) for side in sides)
    difference = _largest(max(apart(a, b) for a, b in zip(ours, theirs, strict=True)))
    if difference > LARGEST_DIFFERENCE:
        raise RuntimeError(f"the sides compute different things: {difference:.1e} apart")
    times = []
    for turn in range(rounds + 2):
        order = sides if turn % 2 else sides[::-1]
        taken = {id(side): _timed(side, x, probe) for side in order}
        times.append([taken[id(side)] for side in sides])
    seconds = [statistics.median(column) for column in zip(*times[2:], strict=True)]
    ratio = statistics.median(theirs / ours for theirs, ours in times[2:])
    return Exchanged(
        size,
        experts,
        samples * tokens * ranks.world_size,
        seconds[1],
        seconds[0],
        ratio,
        difference,
    )


def balanced(samples: int, tokens: int, width: int, experts: int, *, seed: int) -> Tensor:
    """(samples, tokens, width) of which every expert is the first choice of as many tokens, and the second.

    The router's weights are rows of the unit matrix, so that the first `experts` numbers of a token are its
    logits.
    """
    count = samples * tokens
    if count % experts or experts > width:
        raise ValueError(f"{count} tokens of {width} numbers cannot be shared by {experts} experts")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator)
    rows[:, :experts] *= STEP / 30
    first = torch.arange(count)[torch.randperm(count, generator=generator)] % experts
    second = (first + 1) % experts
    rows[torch.arange(count), first] += 2 * STEP
    rows[torch.arange(count), second] += STEP
    return rows.view(samples, tokens, width)


def _ours(whole: Mixture, ranks: Ranks) -> Side:
    """A copy of the layer with this rank's experts, as `parallel.ep` makes it."""
    routing = whole.router.routing
    width, hidden = whole.experts.down.shape[1:]
    mixture = Mixture(width, hidden, 0, routing)
    mixture.router.load_state_dict(whole.router.state_dict())
    layout = resolve_layout("fsdp", None, None, ranks.world_size, ep=ranks.world_size)
    scatter_experts(mixture, expert_mesh(build_mesh(layout, ranks.device), layout), layout)
    mine = slice_of(routing.experts, ranks)
    weights = (mixture.experts.up, mixture.experts.down)
    with torch.no_grad():
        for local, every in zip(weights, (whole.experts.up, whole.experts.down), strict=True):
            local.copy_(every[mine])

    def gradients() -> list[Tensor]:
        return [gradient_of(w) for w in (mixture.router.gate.weight, *weights)]

    return Side(lambda given: mixture(given)[0], mixture, gradients)


def _theirs(whole: Mixture, ranks: Ranks) -> Side:
    """DeepSpeed's layer with the same weights."""
    deepspeed.load(ranks.device)
    from deepspeed.moe.layer import MoE

    routing, up, down = whole.router.routing, whole.experts.up, whole.experts.down
    # Exactly as many places as tokens: with DeepSpeed's factor for two choices that is 1.
    layer: Any = MoE(
        hidden_size=up.shape[-1],
        expert=Expert(up[0].detach(), down[0].detach()),
        num_experts=routing.experts,
        ep_size=ranks.world_size,
        k=CHOSEN,
        capacity_factor=1.0,
        min_capacity=0,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    own, mine = (
        list(layer.deepspeed_moe.experts.deepspeed_experts),
        slice_of(routing.experts, ranks),
    )
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(whole.router.gate.weight)
        for expert, first, second in zip(own, up[mine], down[mine], strict=True):
            expert.up.copy_(first)
            expert.down.copy_(second)

    def gradients() -> list[Tensor]:
        stacked = (
            torch.stack([gradient_of(getattr(e, name)) for e in own]) for name in ("up", "down")
        )
        return [gradient_of(layer.deepspeed_moe.gate.wg.weight), *stacked]

    return Side(lambda given: layer(given)[0], layer, gradients)


def slice_of(experts: int, ranks: Ranks) -> slice:
    """The experts of this rank."""
    share = experts // ranks.world_size
    return slice(ranks.rank * share, (ranks.rank + 1) * share)


def _run(side: Side, x: Tensor, probe: Tensor) -> list[Tensor]:
    """Output, and gradients of input and weights."""
    side.module.zero_grad(set_to_none=True)
    given = x.clone().requires_grad_()
    y = side.forward(given)
    (y * probe).sum().backward()
    return [y.detach(), gradient_of(given), *side.gradients()]


def _timed(side: Side, x: Tensor, probe: Tensor) -> float:
    """Seconds of forward and backward, until the last rank is done."""
    side.module.zero_grad(set_to_none=True)
    given = x.clone().requires_grad_()
    dist.barrier()
    begun = time.perf_counter()
    (side.forward(given) * probe).sum().backward()
    return _largest(time.perf_counter() - begun)


def _largest(value: float) -> float:
    """Over all ranks."""
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)
