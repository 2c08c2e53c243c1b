"""What the trainer costs over a hand-written loop that does the same arithmetic on the same tensors.

Both sides train one rank, step by step in turn, from the same weights on the same batches: noise by sample
key, forward, loss, backward, clipping, fused AdamW, an average of the weights. The right-hand side is
what a person would type; the left-hand side is the trainer's own `one_step` with meters and reports.
They must end with the same weights, so neither can leave work out.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from data_pipeline.loader import Loader
from flows.batch import Batch
from flows.errors import UserError
from flows.initialise import Initialisable, initialise
from flows.randomness import Draw
from parallel.pieces import local_part
from parallel.processes import start, stop
from trainer.assembly import build_objective, plan
from trainer.ema import decay_at
from trainer.loop import Parts, one_step, rate_at
from trainer.optimizers import decays
from trainer.recipe import Recipe
from trainer.reporting import Quiet, Report
from trainer.run_folder import RunFolder
from trainer.running import assemble
from trainer.tracking import Silent

# After the warm-up. Both sides add in the same order but for the gradient norm, whose last bit grows with
# every step of Adam (1e-4 after 200); a step left out shows at 1e-2 at once.
LARGEST_DIFFERENCE = 1e-5


@dataclass(frozen=True)
class Overhead:
    """Median seconds a step of either side, the median of the paired ratios, and how far the weights of the
    two sides are apart after the warm-up (relative L2)."""

    pairs: int
    trainer_seconds: float
    loop_seconds: float
    ratio: float
    weight_difference: float


class Replay:
    """In the place of a loader: the same decoded batches over and over, always ready."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = itertools.cycle(batches)
        self.wait_seconds, self.queue_depth, self.read_depth = 0.0, len(batches), len(batches)
        self.bad_samples = self.redecoded = 0
        self.read_depth = self.redecoded = 0

    def __next__(self) -> Batch:
        return next(self._batches)


class Nobody:
    """A person who is not watching."""

    def note(self, text: str) -> None: ...

    def step(self, line: object) -> None: ...


def measure(recipe: Recipe, pairs: int, warm_up: int) -> Overhead:
    """Alternate `pairs` steps of either side after `warm_up` of each; the order within a pair alternates.

    Raises UserError for a recipe that the hand-written loop does not write out, and RuntimeError if the two
    sides end with different weights, since then they did not do the same work.
    """
    _check_same_work(recipe)
    with (
        tempfile.TemporaryDirectory() as folder,
        in_memory(recipe, Path(folder)) as (parts, batches),
    ):
        weights, by_hand = hand_written_loop(recipe, batches, parts.engine.device)
        sides = (lambda step: one_step(parts, step, stop=False), by_hand)
        seconds: tuple[list[float], list[float]] = ([], [])
        difference = 0.0
        for step in range(warm_up + pairs):
            if step == warm_up:
                ours = parts.engine.parameters()
                difference = _difference({n: local_part(p) for n, p in ours.items()}, weights)
            for side in (0, 1) if step % 2 else (1, 0):
                elapsed = _timed(sides[side], step, parts.engine.device)
                if step >= warm_up:
                    seconds[side].append(elapsed)
    if not difference <= LARGEST_DIFFERENCE:
        raise RuntimeError(f"the two sides trained apart: weights differ by {difference:.1e}")
    ratios = [trainer / loop for trainer, loop in zip(*seconds, strict=True)]
    return Overhead(
        pairs,
        statistics.median(seconds[0]),
        statistics.median(seconds[1]),
        statistics.median(ratios),
        difference,
    )


def _check_same_work(recipe: Recipe) -> None:
    """The loop is one forward in float32 on the whole batch, and one average."""
    train = recipe.train
    refused = {
        "train.precision": train.precision != "fp32",
        "train.microbatch": (train.microbatch or train.batch) < train.batch,
        "train.checkpoint_activations": train.checkpoint_activations > 0,
        "train.compile": train.compile,
        "train.ema": len(train.ema) != 1,
    }
    for key, wrong in refused.items():
        if wrong:
            raise UserError(
                f"{key} makes the trainer do other work than the hand-written loop, so that their times "
                "say nothing; measure with its default, and with one decay in train.ema."
            )


def hand_written_loop(
    recipe: Recipe, batches: list[Batch], device: torch.device
) -> tuple[dict[str, Tensor], Callable[[int], None]]:
    """Plain PyTorch: the weights, and a function that trains them one step."""
    model = plan(recipe, 1).model.build().to(device)
    initialise(cast(Initialisable, model), recipe.seed)
    named = dict(model.named_parameters())
    section = recipe.optimizer
    groups = [
        {
            "params": [p for n, p in named.items() if decays(n, p)],
            "weight_decay": section.weight_decay,
        },
        {"params": [p for n, p in named.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=section.betas, eps=section.eps, fused=True)
    average = [parameter.detach().clone() for parameter in named.values()]
    objective = build_objective(recipe)
    endless = itertools.cycle(batches)

    def step(index: int) -> None:
        batch = next(endless).to(device)
        ready = objective.prepare(batch, Draw(recipe.seed, index, batch.position))
        loss = objective.loss(model(**ready.inputs), ready.targets).mean()
        loss.backward()
        if section.clip is not None:
            torch.nn.utils.clip_grad_norm_(named.values(), section.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, index)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            weight = 1 - decay_at(recipe.train.ema[0], index)
            torch._foreach_lerp_(average, list(named.values()), weight)

    return {name: parameter.detach() for name, parameter in named.items()}, step


@contextmanager
def in_memory(recipe: Recipe, folder: Path) -> Iterator[tuple[Parts, list[Batch]]]:
    """The trainer's parts on one rank, fed from memory, reporting into a folder as in a real run."""
    made = plan(recipe, 1)
    ranks = start("auto", recipe.parallel.timeout_seconds)
    try:
        run = RunFolder(folder)
        report: Quiet = Report(run, Silent(), Nobody(), recipe)
        parts = assemble(made, run, ranks, report)
        batches = [next(parts.loader) for _ in range(16)]
        parts.loader.close()
        yield replace(parts, loader=cast(Loader, Replay(batches))), batches
    finally:
        stop()


def _timed(side: Callable[[int], None], step: int, device: torch.device) -> float:
    begin = time.perf_counter()
    side(step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Relative L2 norm of the difference of two sets of weights."""
    ours, theirs = (torch.cat([w[n].detach().flatten() for n in first]) for w in (first, second))
    return float((ours - theirs).norm() / theirs.norm())
