"""One line of numbers a step, read one step late so that the host never waits for the device.

Losses and flags travel in one small sum over the ranks; the host reads step s while the device works on
step s + 1. Every rank reads the same numbers at the same step, so a decision made of them (stop, give up)
needs no more talk and cannot deadlock.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from data_pipeline.faults import Budget
from flows.errors import UserError
from parallel.engines.engine import StepResult
from trainer.meters import Reading, Readout, mfu, peak_bf16_flops
from trainer.routing import BUCKETS, ExpertUse, RoutingSums, described, read_rows, rows_of
from trainer.routing_trace import traced_line

TRACE = "routing"  # the key of what is written beside the metrics


class Telemetry:
    """What the loop knows of itself.

    stop_agreed: some rank was asked to stop, and every rank has read so at this same step
    skipped: steps left out since the run began, because their gradient was not finite
    experts: how the experts were used of late, without such steps
    """

    def __init__(
        self,
        *,
        batch: int,
        flops: int,
        world_size: int,
        max_skipped: int,
        precision: str,
        budget: Budget,
        device: torch.device,
    ) -> None:
        """
        flops: of forward and backward of one sample
        max_skipped: steps in a row that may be skipped
        precision: `train.precision`, for advice
        budget: bad samples that may be replaced
        """
        self.stop_agreed = False
        self.skipped = 0
        self._in_a_row, self._max_skipped = 0, max_skipped
        self._precision = precision
        self.budget = budget
        self.experts = ExpertUse()
        self._batch, self._flops, self._world_size = batch, flops, world_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._peak = peak_bf16_flops(name)
        self._readout = Readout()
        self._host: dict[int, dict[str, Any]] = {}
        self._read: list[Reading] = []
        self._last = time.perf_counter()

    def push(
        self,
        step: int,
        result: StepResult,
        *,
        norm: Tensor,
        skip: Tensor,
        stop: bool,
        bad: int,
        host: dict[str, Any],
        sum_over_data: Callable[[Tensor], Tensor],
        sum_over_peers: Callable[[Tensor], Tensor],
        routing: RoutingSums | None = None,
    ) -> None:
        """Send the numbers of step `step` (from 0) on their way; `host` are those that are here already.

        bad: samples of this rank's share that were replaced
        routing: of all ranks, where the network has experts
        """
        loss = result.loss
        # Those who share samples say the same of them, but one alone may be asked to stop.
        stopping = sum_over_peers(loss.new_full((), float(stop)))
        samples, bad_ones = (loss.new_full((), float(n)) for n in (len(loss), bad))
        flags = torch.stack([loss.sum(), samples, stopping, bad_ones])
        sums = sum_over_data(torch.cat([flags, *_by_time(result)]))
        rows = {"sums": sums} | (rows_of(routing) if routing is not None else {})
        ready = self._readout.put(step, {**rows, "grad_norm": norm, "skip": skip})
        if ready is not None:
            self._read.append(ready)
        now = time.perf_counter()
        self._host[step] = host | {"step_seconds": now - self._last}
        self._last = now

    def lines(self, everything: bool = False) -> Iterator[dict[str, Any]]:
        """A line of `metrics.jsonl` for each step whose numbers are there, or wait for `everything`.

        At a traced step that was not skipped it has the line of `routing.jsonl` under `TRACE`.

        Raises UserError, on every rank at the same step, after too many skipped steps in a row.
        """
        if everything and (held := self._readout.take()) is not None:
            self._read.append(held)
        while self._read:
            yield self._line(self._read.pop(0))

    def restart_clock(self) -> None:
        """What happened since the last step (a checkpoint, samples) is not part of the next one."""
        self._last = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "bad_samples": self.budget.state_dict(),
            "experts": self.experts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = int(state["skipped"])
        self.budget.load_state_dict(state["bad_samples"])
        self.experts.load_state_dict(state.get("experts"))

    def _line(self, reading: Reading) -> dict[str, Any]:
        loss, samples, stop, bad, *by_time = reading.rows["sums"]
        self.stop_agreed = self.stop_agreed or stop > 0
        self.budget.add(reading.step * self._batch, int(bad))
        skipped = reading.scalars["skip"] > 0
        self._count_skips(reading.step, skipped)
        host = self._host.pop(reading.step)
        rate = self._batch / host["step_seconds"]
        sums, counts = by_time[:BUCKETS], by_time[BUCKETS:]
        line = {
            "step": reading.step + 1,
            "loss": loss / samples,
            "grad_norm": reading.scalars["grad_norm"],
            "samples_per_second": rate,
            **host,
            "mfu": mfu(self._flops, rate, self._peak, self._world_size),
            "skipped": self.skipped,
            "bad_samples": self.budget.total,
            "loss_by_time": [s / n if n else None for s, n in zip(sums, counts, strict=True)],
        }
        if (routing := read_rows(reading.rows)) is None:
            return line
        line |= {"experts": described(routing, samples)}
        if skipped:
            # Its routers may have compared numbers that are not finite, and nothing was learned of it.
            return line
        self.experts.add(routing.load)
        traced = traced_line(routing)
        return line if traced is None else line | {TRACE: traced}

    def _count_skips(self, step: int, skipped: bool) -> None:
        self.skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row > self._max_skipped:
            remedies = "lower optimizer.lr or set optimizer.clip"
            if self._precision != "fp32":
                remedies = "lower optimizer.lr, set optimizer.clip, or use train.precision=fp32"
            raise UserError(
                f"step {step + 1}: the gradient was not finite {self._in_a_row} steps in a row; {remedies}, "
                "and run again."
            )


def _by_time(result: StepResult) -> tuple[Tensor, Tensor]:
    """(BUCKETS,) sum of losses and number of samples in each interval of time."""
    if result.time is None:
        return result.loss.new_zeros(BUCKETS), result.loss.new_zeros(BUCKETS)
    bucket = (result.time * BUCKETS).long().clamp(0, BUCKETS - 1)
    # A product with the one-hot matrix, not a scatter: the same bits on every run.
    member = torch.nn.functional.one_hot(bucket, BUCKETS).to(result.loss.dtype)
    return result.loss @ member, member.sum(0)
