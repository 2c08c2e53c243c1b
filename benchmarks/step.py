"""Where the time of a training step goes, as a fraction of what this machine's matrix products reach.

Steps of the trainer and bare matrix products of the model's own shapes take turns, so that a machine
that slows down slows both. The operations of a step are counted by PyTorch's operator counter, and the
time of each kind of operator by its profiler, in steps of their own.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.overhead import in_memory
from flows.batch import Batch
from trainer.assembly import plan
from trainer.loop import Parts, one_step
from trainer.recipe import Recipe

WARM_UP = 5
PROFILED = 5
# Kind -> parts of operators' names; the first kind that fits counts.
KINDS = {
    "optimizer and averages": ("adam", "lerp"),
    "attention": ("attention",),
    "matrix products": ("mm", "linear", "conv"),
    "normalisation": ("norm",),
    "copies": ("copy", "cat", "clone", "contiguous", "flip", "index", "fill", "zero"),
}
REST = "elementwise and the rest"


@dataclass(frozen=True)
class StepCost:
    """Medians over the steps.

    seconds: of a step
    flops: matrix-product operations of a step, forward and backward, as counted
    peak: matrix-product operations a second of bare products, in the same run
    shares: kind of operator -> share of the profiled time
    """

    threads: int
    device: str
    seconds: float
    flops: int
    peak: float
    shares: dict[str, float]

    @property
    def of_peak(self) -> float:
        """The fraction of the matrix-product peak that a whole step reaches."""
        return self.flops / self.seconds / self.peak


def measure(recipe: Recipe, steps: int) -> StepCost:
    """`steps` training steps of the recipe on one rank, batches from memory, beside bare products."""
    width = plan(recipe, 1).model.config.width
    with (
        tempfile.TemporaryDirectory() as folder,
        in_memory(recipe, Path(folder)) as (parts, batches),
    ):
        device = parts.engine.device
        for step in range(WARM_UP):
            one_step(parts, step, stop=False)
        products = Products(len(batches[0]) * _tokens(batches[0]), width, device)
        seconds, rates = [], []
        for step in range(WARM_UP, WARM_UP + steps):
            rates.append(products.rate())
            begin = time.perf_counter()
            one_step(parts, step, stop=False)
            _wait(device)
            seconds.append(time.perf_counter() - begin)
        flops = _count(parts, WARM_UP + steps)
        shares = _profile(parts, WARM_UP + steps + 1)
    return StepCost(
        torch.get_num_threads(),
        device.type,
        statistics.median(seconds),
        flops,
        statistics.median(rates),
        shares,
    )


class Products:
    """Bare products of the feed-forward's shape: (rows, width) by (width, 4 width)."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._left = torch.randn(rows, width, generator=generator).to(device)
        self._right = torch.randn(width, 4 * width, generator=generator).to(device)
        self._out = torch.empty(rows, 4 * width, device=device)
        self._operations = 2 * rows * width * 4 * width

    def rate(self, repeats: int = 3) -> float:
        """Operations a second of the fastest of a few."""
        best = float("inf")
        for _ in range(repeats):
            begin = time.perf_counter()
            torch.mm(self._left, self._right, out=self._out)
            _wait(self._out.device)
            best = min(best, time.perf_counter() - begin)
        return self._operations / best


def _tokens(batch: Batch) -> int:
    """A number of tokens of the right size, for patches of two pixels."""
    return max(batch.image.shape[-1] * batch.image.shape[-2] // 4, 16)


def _count(parts: Parts, step: int) -> int:
    # Compiled blocks do the same products, and cannot be counted.
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False) as counter:
        one_step(parts, step, stop=False)
    return int(counter.get_total_flops())


def _profile(parts: Parts, first: int) -> dict[str, float]:
    """Share of the operators' own time by kind."""
    cuda = parts.engine.device.type == "cuda"
    activity = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activity) as profiled:
        for step in range(first, first + PROFILED):
            one_step(parts, step, stop=False)
        _wait(parts.engine.device)
    spent = dict.fromkeys([*KINDS, REST], 0.0)
    for event in profiled.key_averages():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[_kind(event.key)] += own
    total = sum(spent.values())
    return {kind: value / total for kind, value in spent.items()}


def _kind(name: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in name.lower() for part in parts):
            return kind
    return REST


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
