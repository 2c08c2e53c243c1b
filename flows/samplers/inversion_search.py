"""The fastest way to invert each block of a flow on this machine, for batches of one size.

Iterating over many tokens does more arithmetic than a cached step, but in a few large operations
instead of many small ones. Which wins depends on the machine, on the batch, and on how soon a block
settles, so this tries them: block after block, on one batch of noise, beside the sequential solution.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from flows.models.autoregressive import FlowBlock
from flows.samplers.inversion import (
    SEQUENTIAL,
    AutoregressiveFlow,
    Strategy,
    Told,
    prior,
    solve,
)
from flows.samplers.inversion_guidance import NO_GUIDANCE, FlowGuidance

# A strategy must win by this much, and in the best of so many turns, so that no noise of the clock
# chooses one that loses.
MARGIN = 0.9
TURNS = 3
HOPELESS = 1.5  # times the best so far, after which a strategy is left
GROUPS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Choice:
    """How to invert one block, and what was measured.

    seconds, sequential_seconds: of the choice and of sequential sampling, for the batch
    error: root of the mean square difference from the sequential solution, relative to the latter
    """

    strategy: Strategy
    seconds: float
    sequential_seconds: float
    error: float


def choose_strategy(
    model: AutoregressiveFlow,
    batch: int,
    label: Tensor | None = None,
    text: Tensor | None = None,
    *,
    guidance: FlowGuidance = NO_GUIDANCE,
    tolerance: float,
    accuracy: float,
    clamp: float | None = None,
    seed: int = 0,
    variance: Tensor | None = None,
) -> list[Choice]:
    """The fastest strategy of each block, the top block (the first to be inverted) first.

    Give `[choice.strategy for choice in ...]` to `invert`. It takes as long as sampling sequentially
    a few times and trying the candidates, each of which is left when it is much slower than the best
    so far.

    batch: samples in a batch, the size that the choice is for
    label, text, guidance, tolerance, clamp: as for `invert`
    accuracy: largest error of a block's solution, see `Choice`
    variance: of the prior, as for `prior`
    """
    device = cast(FlowBlock, model.flow_blocks[0]).project_in.weight.device
    samples = torch.arange(batch, device=device)
    choices = []
    with torch.inference_mode():
        told = Told(
            model.condition(label, text, batch, device),
            model.condition(None, None, batch, device),
            guidance,
        )
        tokens = prior(model, seed, samples, variance)
        for module in reversed(model.flow_blocks):
            block = cast(FlowBlock, module)
            tokens, choice = _choose(block, tokens, told, tolerance, accuracy, clamp)
            choices.append(choice)
    return choices


def _choose(
    block: FlowBlock,
    w: Tensor,
    told: Told,
    tolerance: float,
    accuracy: float,
    clamp: float | None,
) -> tuple[Tensor, Choice]:
    """The sequential solution of a block, and how to come to it sooner."""

    def timed(strategy: Strategy, patience: float) -> tuple[Tensor | None, float]:
        begin = _now(w.device)
        solved = solve(
            block, w, told, strategy, tolerance=tolerance, clamp=clamp, patience=patience
        )
        return (None if solved is None else solved[0]), _now(w.device) - begin

    # The first time is slower: memory is new.
    timed(SEQUENTIAL, math.inf)
    exact, sequential = timed(SEQUENTIAL, math.inf)
    assert exact is not None
    best = Choice(SEQUENTIAL, sequential, sequential, 0.0)
    size = exact.square().mean().sqrt()
    for strategy in _candidates(block.shape.chain):
        limit = best.seconds * (MARGIN if best.strategy == SEQUENTIAL else 1.0)
        # The first time is slower here, too: what is not far from the best has a second one.
        found, first = timed(strategy, HOPELESS * limit)
        if found is None:
            continue
        seconds = min(first, timed(strategy, HOPELESS * limit)[1])
        if seconds > limit:
            continue
        error = float((found - exact).square().mean().sqrt() / size)
        if error <= accuracy:
            best = Choice(strategy, seconds, sequential, error)
    if best.strategy == SEQUENTIAL:
        return exact, best
    # What won once may have been lucky, or sequential sampling unlucky: both again, in turn.
    seconds = best.seconds
    for _ in range(TURNS - 1):
        sequential = min(sequential, timed(SEQUENTIAL, math.inf)[1])
        seconds = min(seconds, timed(best.strategy, math.inf)[1])
    if seconds > MARGIN * sequential:
        return exact, Choice(SEQUENTIAL, sequential, sequential, 0.0)
    return exact, replace(best, seconds=seconds, sequential_seconds=sequential)


def _candidates(chain: int) -> Iterator[Strategy]:
    """From all tokens at once down to a few, from either guess: which is nearer is the block's."""
    for group in (chain, *reversed(GROUPS)):
        if group <= chain:
            yield Strategy(group, sliding=group < chain)
            yield Strategy(group, guess="zero", sliding=group < chain)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
