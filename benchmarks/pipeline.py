"""Pipeline schedules on real ranks, beside what the simulator says of them.

The work of a stage is a sleep of known length, in forward and in both halves of the backward, so that
any number of ranks keep their pace on any number of cores; what is sent, awaited and added between ranks
is real. All schedules do the same work for a microbatch, cut into as many stages as each has.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from parallel.pipeline.catalog import NAMES, Words, make_schedule
from parallel.pipeline.deferred import KeepBack
from parallel.pipeline.runtime import Runtime
from parallel.pipeline.schedule import Schedule
from parallel.pipeline.timeline import equal_costs, simulate
from parallel.processes import Ranks

WORDS = Words("schedule", "--ranks", "--microbatches", "chunks")
LARGEST_ERROR = 0.05  # of the idle share
OURS, THEIRS = "bitpipe", "interleaved1f1b"
# The paper's range of training throughput over the schedules it is compared with.
GAIN = (1.05, 1.28)
WIDTH = 64


@dataclass(frozen=True)
class Row:
    """One schedule.

    seconds: of the least disturbed step, from the first rank's start to the last one's end
    idle: mean over the ranks of the share of that step in which they do not work
    predicted: the same, simulated without any latency
    """

    name: str
    microbatches: int
    seconds: float
    idle: float
    predicted: float

    @property
    def met(self) -> bool:
        return abs(self.idle - self.predicted) <= LARGEST_ERROR

    @property
    def speed(self) -> float:
        """Microbatches a second."""
        return self.microbatches / self.seconds


class Sleeper:
    """Sleeps as long as it is told, and keeps the sum."""

    def __init__(self) -> None:
        self.slept = 0.0
        late = []
        for _ in range(20):
            begin = time.perf_counter()
            time.sleep(0.002)
            late.append(time.perf_counter() - begin - 0.002)
        self._late = sorted(late)[len(late) // 2]

    def __call__(self, seconds: float) -> None:
        begin = time.perf_counter()
        time.sleep(max(seconds - self._late, 0.0))
        self.slept += time.perf_counter() - begin


class Work(Function):
    """The identity, whose backward sleeps: for the input's gradient at once, for the weight's when asked."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        sleep: Callable[[float], None],
        length: float,
        keep: KeepBack,
    ) -> Tensor:
        sleep(length)
        ctx.sleep, ctx.length, ctx.keep = sleep, length, keep
        return x + 0.0 * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.sleep(ctx.length)
        ctx.keep(partial(ctx.sleep, ctx.length))
        return gradient, torch.zeros_like(gradient[0]), None, None, None


class SleepingStage(nn.Module):
    """A stage that takes `length` seconds for a forward and for either half of a backward."""

    def __init__(self, sleep: Callable[[float], None], length: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))
        self._sleep, self._length = sleep, length
        self._keep: KeepBack = _at_once

    def keep_back(self, keep: KeepBack) -> None:
        self._keep = keep

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Work.apply(x, self.weight, self._sleep, self._length, self._keep)
        return result


def _at_once(work: Callable[[], None]) -> None:
    work()


def sides_of(
    names: Sequence[str] | None, ranks: int, microbatches: Sequence[int]
) -> list[tuple[str, int]]:
    """Schedules and microbatches to measure; where none is named, all that have enough of them.

    Raises UserError for what a schedule that is named cannot do.
    """
    sides = [
        (name, number)
        for number in microbatches
        for name in names or NAMES
        if names or name != "dualpipev" or number >= 2 * ranks
    ]
    for name, number in sides:
        make_schedule(name, ranks, number, None, WORDS)
    return sides


def measure(
    ranks: Ranks, sides: Sequence[tuple[str, int]], seconds: float, rounds: int
) -> list[Row]:
    """`rounds` steps of every schedule, in turn; a collective, the same result on every rank.

    sides: schedules by name, and the microbatches of their steps
    seconds: of the forward of a microbatch in one rank's share of the model
    """
    made = [
        _Side(make_schedule(name, ranks.world_size, number, None, WORDS), ranks, seconds)
        for name, number in sides
    ]
    steps = [[side.step() for side in made] for _ in range(rounds + 1)][1:]
    rows = []
    for index, side in enumerate(made):
        length, idle = min(round[index] for round in steps)
        predicted = simulate(side.schedule, equal_costs(side.schedule.stages)).bubble
        rows.append(Row(side.schedule.name, side.schedule.microbatches, length, idle, predicted))
    return rows


def gains(rows: Sequence[Row]) -> dict[int, float]:
    """Microbatches of a step -> throughput of BitPipe over that of interleaved 1F1B."""
    speeds = {(row.name, row.microbatches): row.speed for row in rows}
    return {
        number: speed / speeds[THEIRS, number]
        for (name, number), speed in speeds.items()
        if name == OURS and (THEIRS, number) in speeds
    }


class _Side:
    """A schedule whose stages sleep."""

    def __init__(self, schedule: Schedule, ranks: Ranks, seconds: float) -> None:
        self.schedule = schedule
        self._sleeper = Sleeper()
        length = seconds * schedule.ranks / schedule.stages
        modules = {
            held: SleepingStage(self._sleeper, length) for held in schedule.local(ranks.rank)
        }
        self._runtime = Runtime(schedule, modules, _loss, group=None, device=torch.device("cpu"))

    def step(self) -> tuple[float, float]:
        """(seconds, mean idle share of the ranks) of one step."""
        number = self.schedule.microbatches
        inputs = [(torch.ones(1, WIDTH),) for _ in range(number)]
        dist.barrier()
        self._sleeper.slept, begin = 0.0, time.monotonic()
        self._runtime.run(inputs, [{}] * number, [torch.zeros(1)] * number)
        own = (begin, time.monotonic(), self._sleeper.slept)
        all_ranks: list[Any] = [None] * self.schedule.ranks
        dist.all_gather_object(all_ranks, own)
        begins, ends, slept = zip(*all_ranks, strict=True)
        length = max(ends) - min(begins)
        return length, 1.0 - sum(slept) / (len(slept) * length)


def _loss(output: Tensor, target: Tensor) -> Tensor:  # noqa: ARG001 - there is nothing to learn
    return output.sum()
