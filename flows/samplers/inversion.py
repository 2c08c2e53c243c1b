"""From the prior to data through an autoregressive flow: token after token, or many tokens at once.

A block's chain u_j = s_j(u_0 ... u_{j-1}) w_j + m_j(u_0 ... u_{j-1}) is solved

sequentially            one token a network call, its keys and values kept;
by Jacobi iteration     all tokens at once from a guess, again and again: after k calls the first k
                        tokens are exact (Song et al. 2021), and the rest soon close;
by GS-Jacobi            Jacobi within a group of tokens, Gauss-Seidel from group to group, with the
                        keys and values of finished groups kept (Liu and Qin 2025, "Accelerate
                        TarFlow Sampling with GS-Jacobi Iteration"). STARFlow's blockwise Jacobi is
                        this, with groups of 32 to 64 tokens.

Each iteration starts behind the tokens that are settled, computed from tokens that stay as they are.
A `sliding` group does not wait for its slowest token: as tokens at its front settle, as many join at
its back.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from flows.errors import UserError
from flows.models.autoregressive import BlockCache, FlowBlock
from flows.randomness import Draw
from flows.samplers.inversion_guidance import NO_GUIDANCE, FlowGuidance, guide

# Where a group's iteration starts: at the prior's tokens w, or at zero.
Guess = Literal["prior", "zero"]
# Of a token that is not settled; squares of such numbers can still be added up.
LARGEST = 1e12


class AutoregressiveFlow(Protocol):
    """What an inversion needs of a model: TarFlow and STARFlow."""

    flow_blocks: nn.ModuleList

    def condition(
        self, label: Tensor | None, text: Tensor | None, batch: int, device: torch.device
    ) -> Tensor | None: ...

    def image(self, tokens: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Strategy:
    """How to solve one block.

    group: tokens of a group; 1 is sequential, the length of the chain (or more) is Jacobi
    iterations: at most this many calls for a group; None: until it settles. As many as it has tokens
        are always enough, and exact
    guess: where iterations start
    sliding: groups move on with their settled tokens instead of following one another; with
        `iterations`, by at least group / iterations tokens a call
    """

    group: int
    iterations: int | None = None
    guess: Guess = "prior"
    sliding: bool = False

    def __post_init__(self) -> None:
        if self.group < 1 or (self.iterations is not None and self.iterations < 1):
            raise UserError(
                f"a strategy with groups of {self.group} tokens and {self.iterations} iterations "
                "solves nothing; give both at least 1."
            )


SEQUENTIAL = Strategy(1)


@dataclass(frozen=True)
class Inverted:
    """Samples, and what they cost.

    x: (batch, channels, height, width) float32
    calls: evaluations of each block's network, the top block first, whatever the number of tokens
        in one; a guided one counts twice
    network_calls: passes through the full depth of the flow that these add up to, each block's calls
        weighed by its share of the transformer layers. The pass over a text is not counted
    """

    x: Tensor
    calls: tuple[int, ...]
    network_calls: float


def prior(
    model: AutoregressiveFlow, seed: int, samples: Tensor, variance: Tensor | None = None
) -> Tensor:
    """(batch, tokens, features) noise, each sample's a function of (seed, its index) alone.

    samples: (batch,) int64 index of each sample, on the device of the result
    variance: (tokens, features) of the prior, for flows that preserve volume, see
        `flows.objectives.likelihood.prior_variance`; None for 1
    """
    shape = cast(FlowBlock, model.flow_blocks[0]).shape
    noise = Draw(seed, 0, samples).normal("sample_noise", (shape.tokens, shape.features))
    return noise if variance is None else noise * variance.sqrt()


def invert(
    model: AutoregressiveFlow,
    z: Tensor,
    label: Tensor | None = None,
    text: Tensor | None = None,
    *,
    strategy: Strategy | Sequence[Strategy] = SEQUENTIAL,
    guidance: FlowGuidance = NO_GUIDANCE,
    tolerance: float = 0.0,
    clamp: float | None = None,
) -> Inverted:
    """Carry noise z to samples.

    z: (batch, tokens, features) float32, see `prior`
    label: (batch,) int64 class of each sample; None for none
    text: (batch, text_tokens, text_width); None for none
    strategy: of every block, or one for each, the top block (the first to be solved) first
    tolerance: a token stays as it is when none of its features changes by more than this in any
        sample; 0 for exact results
    clamp: iterates, but not sequential tokens, are kept within +- this; None for no clamp
    """
    blocks = [cast(FlowBlock, block) for block in reversed(model.flow_blocks)]
    strategies = [strategy] * len(blocks) if isinstance(strategy, Strategy) else list(strategy)
    if len(strategies) != len(blocks):
        raise UserError(
            f"{len(strategies)} strategies are given for a flow of {len(blocks)} blocks; give one for "
            "each, the top block first."
        )
    calls = []
    with torch.inference_mode():
        told = Told(
            model.condition(label, text, len(z), z.device),
            model.condition(None, None, len(z), z.device),
            guidance,
        )
        tokens = z.float()
        for block, chosen in zip(blocks, strategies, strict=True):
            solved = solve(block, tokens, told, chosen, tolerance=tolerance, clamp=clamp)
            assert solved is not None
            tokens = solved[0]
            calls.append(solved[1])
    layers = [block.shape.layers for block in blocks]
    passes = sum(n * depth for n, depth in zip(calls, layers, strict=True)) / sum(layers)
    # A copy from outside inference mode may take part in gradients, such as those of denoising.
    return Inverted(model.image(tokens.clone()), tuple(calls), passes)


@dataclass(frozen=True)
class Told:
    """What the blocks are told.

    condition, null: of the samples, and of none, see `FlowBlock.forward`
    """

    condition: Tensor | None
    null: Tensor | None
    guidance: FlowGuidance


def solve(
    block: FlowBlock,
    w: Tensor,
    told: Told,
    strategy: Strategy,
    *,
    tolerance: float,
    clamp: float | None,
    patience: float = math.inf,
) -> tuple[Tensor, int] | None:
    """Invert one block: tokens w (batch, tokens, features) in raster order -> (u, network calls).

    None if iterations take longer than `patience` seconds.
    """
    chain = Chain(block, w, told)
    if strategy.group == 1:
        chain.one_by_one()
    elif not chain.iterate(strategy, tolerance, clamp, time.perf_counter() + patience):
        return None
    return chain.result(), chain.calls


class Chain:
    """The chain of one block while it is solved.

    inputs: (batch, chain + 1, features): the network's inputs v, of which v_{j+1} is token j
    """

    def __init__(self, block: FlowBlock, w: Tensor, told: Told) -> None:
        shape, batch = block.shape, len(w)
        w = block.ordered(w)
        self.block, self.length, self.calls = block, shape.chain, 0
        self.w = w[:, shape.tokens - shape.chain :]
        first = w[:, 0] if block.start is None else block.start.float()
        self.inputs = w.new_empty(batch, shape.chain + 1, shape.features)
        self.inputs[:, 0] = first
        self._guided = told.guidance.applies(block.conditional)
        self._guidance = told.guidance
        self._weight = told.guidance.weights(shape.chain, w)
        self._cache = self._open(told, batch)

    def _open(self, told: Told, batch: int) -> BlockCache:
        if not self._guided:
            return self.block.open(told.condition, batch, None)
        condition, sharpness = told.condition, None
        if condition is not None and told.null is not None:
            condition = torch.cat((condition, told.null))
        if told.guidance.temperature != 1.0:
            sharpness = self.w.new_ones(2 * batch, 1, 1, 1)
            sharpness[batch:] = 1.0 / told.guidance.temperature
        return self.block.open(condition, 2 * batch, sharpness)

    def result(self) -> Tensor:
        """All tokens in raster order."""
        tokens = self.inputs if self.block.start is None else self.inputs[:, 1:]
        return self.block.ordered(tokens)

    def update(self, begin: int, end: int) -> Tensor:
        """Tokens begin ... end - 1 as the inputs up to them predict them; one network call.

        The cache must hold the inputs before `begin`, and then holds those before `end`.
        """
        v = self.inputs[:, begin:end]
        if self._guided:
            self.calls += 2
            log_scale, shift = self.block.predict(torch.cat((v, v)), self._cache)
            weight, scale = self._weight[begin:end], self.block.shape.scale
            log_scale, shift = guide(log_scale, shift, weight, how=self._guidance, scale=scale)
        else:
            self.calls += 1
            log_scale, shift = self.block.predict(v, self._cache)
        w = self.w[:, begin:end]
        return shift + w if log_scale is None else torch.addcmul(shift, log_scale.exp(), w)

    def guess(self, begin: int, end: int, guess: Guess) -> None:
        """Give tokens begin ... end - 1 their first value."""
        self.inputs[:, begin + 1 : end + 1] = self.w[:, begin:end] if guess == "prior" else 0.0

    def one_by_one(self) -> None:
        for j in range(self.length):
            self.inputs[:, j + 1 : j + 2] = self.update(j, j + 1)

    def iterate(
        self, strategy: Strategy, tolerance: float, clamp: float | None, deadline: float
    ) -> bool:
        """Jacobi iterations from group to group, or in a group that slides; False if time ran out.

        Tokens before `begin` are settled; those before `guessed` have a value; `used` iterations of
        the group are done.
        """
        begin, guessed, used = 0, 0, 0
        while begin < self.length:
            end = self._end(begin, strategy)
            if guessed < end:
                self.guess(guessed, end, strategy.guess)
                guessed = end
            self._cache.rewind(begin)
            new = self.update(begin, end)
            if clamp is not None:
                new = new.clamp_(-clamp, clamp)
            tokens = self.inputs[:, begin + 1 : end + 1]
            settled = _settled(new, tokens, tolerance)
            # Tokens that are to change may be beyond all bounds yet, and even masked ones would break those
            # before them: zero times infinity is no number.
            rest = new[:, settled:]
            rest.copy_(torch.where(rest.abs() <= LARGEST, rest, tokens[:, settled:]))
            tokens.copy_(new)
            used += 1
            if strategy.iterations is not None:
                if strategy.sliding:
                    settled = max(settled, -(-strategy.group // strategy.iterations))
                elif used == strategy.iterations:
                    settled = end - begin
            begin = min(begin + settled, end)
            if not strategy.sliding and begin == end:
                used = 0
            if time.perf_counter() > deadline:
                return False
        return True

    def _end(self, begin: int, strategy: Strategy) -> int:
        """Where the group ends whose first token that is not settled is `begin`."""
        first = begin if strategy.sliding else begin // strategy.group * strategy.group
        return min(first + strategy.group, self.length)


def _settled(new: Tensor, old: Tensor, tolerance: float) -> int:
    """Tokens at the front that need no further call: the first, and every next one that was computed
    from tokens that stayed as they were."""
    if new.shape[1] == 1:
        return 1
    change = (new[:, :-1] - old[:, :-1]).abs_().amax(dim=(0, 2))
    return 1 + int((change <= tolerance).cumprod(0).sum())
