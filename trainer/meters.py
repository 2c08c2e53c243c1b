"""What a step tells about itself without waiting: readings, throughput, loss by time, MFU.

Reading a number that lies on a device stops the host until the device has caught up. `Readout`
therefore copies the numbers of step s behind the step's own work and hands them out in step s + 1.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Dense bfloat16 matrix FLOP/s of one device as torch names it, from the makers' data sheets (which
# print twice as much, "with sparsity"). The first name found in the device's name counts: the
# slower variants of a chip stand before the chip.
PEAK_BF16_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756.5e12,
    "H100": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "MI325X": 1307.4e12,
    "MI300X": 1307.4e12,
}


@dataclass(frozen=True)
class Reading:
    """Numbers of one step on the host: single ones in `scalars`, rows of them in `rows`."""

    step: int
    scalars: dict[str, float]
    rows: dict[str, tuple[float, ...]]


class Readout:
    """Holds the device numbers of one step until the next asks for them.

    On CUDA they are copied to pinned memory behind an event, so that nobody waits; on the CPU they
    are there already. Values keep their full precision (float64 holds every float32).
    """

    def __init__(self) -> None:
        self._held: tuple[int, list[tuple[str, int]], Tensor, torch.cuda.Event | None] | None = None

    def put(self, step: int, values: Mapping[str, Tensor]) -> Reading | None:
        """Hold () or (n,) tensors of `step`, all on one device; returns the step held before."""
        ready = self.take()
        if values:
            # A negative length marks a single number, as against a row of one.
            shape = [(n, len(v) if v.dim() else -1) for n, v in values.items()]
            flat = torch.cat([v.detach().reshape(-1).double() for v in values.values()])
            self._held = (step, shape, *_to_host(flat))
        return ready

    def take(self) -> Reading | None:
        """The step held, and nothing is held any more; None if there was none."""
        if self._held is None:
            return None
        step, shape, host, event = self._held
        self._held = None
        if event is not None:
            event.synchronize()
        numbers = iter(host.tolist())
        scalars: dict[str, float] = {}
        rows: dict[str, tuple[float, ...]] = {}
        for name, length in shape:
            if length < 0:
                scalars[name] = next(numbers)
            else:
                rows[name] = tuple(next(numbers) for _ in range(length))
        return Reading(step, scalars, rows)


class TimeBuckets:
    """Mean loss by flow time: t in [0, 1] cut into equal buckets, summed on the device."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self._sums = torch.zeros(2, count, dtype=torch.float64, device=device)

    def add(self, time: Tensor, loss: Tensor) -> None:
        """Sort (batch,) losses into the buckets of their (batch,) times, but for non-finite ones.

        The sum is a comparison and a product, not a scatter: the same bits on every run.
        """
        bucket = (time.double() * self.count).long().clamp(0, self.count - 1)
        edges = torch.arange(self.count, device=time.device)
        good = torch.isfinite(loss)
        chosen = ((bucket[:, None] == edges) & good[:, None]).double()
        values = torch.where(good, loss, 0).double()
        self._sums += torch.stack([values @ chosen, chosen.sum(0)])

    def drain(self, sum_over_data: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """(buckets,) sums and counts over the data ranks, for a `Readout`; starts again from zero.

        A collective: every rank calls it at the same step.
        """
        sums, counts = sum_over_data(self._sums)
        self._sums = torch.zeros_like(self._sums)
        return {"time_loss_sum": sums, "time_loss_count": counts}


def bucket_means(reading: Reading) -> dict[str, float]:
    """`loss_by_time/0.3-0.4` -> mean loss, of the buckets that saw a sample."""
    sums, counts = reading.rows["time_loss_sum"], reading.rows["time_loss_count"]
    width = 1 / len(sums)
    return {
        f"loss_by_time/{i * width:.4g}-{(i + 1) * width:.4g}": total / count
        for i, (total, count) in enumerate(zip(sums, counts, strict=True))
        if count
    }


class Throughput:
    """Samples a second over the last steps, and the seconds left."""

    def __init__(self, batch: int, total_steps: int, window: int) -> None:
        self.batch, self.total_steps = batch, total_steps
        self._seconds: deque[float] = deque(maxlen=window)
        self._step = 0

    def update(self, step: int, seconds: float) -> None:
        """Step `step` (counted from 1) is done and took `seconds`."""
        self._step = step
        self._seconds.append(seconds)

    @property
    def samples_per_second(self) -> float:
        """Over the window; nan before the first step."""
        total = sum(self._seconds)
        return self.batch * len(self._seconds) / total if total > 0 else math.nan

    @property
    def eta_seconds(self) -> float:
        """Until the last step, at the pace of the window; nan before the first step."""
        left = max(self.total_steps - self._step, 0)
        return left * self.batch / self.samples_per_second


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None for one that is not in the table.

    A slice of a device (MIG) is none of them: its share is not in its name alone.
    """
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None
    for name, peak in PEAK_BF16_FLOPS.items():
        wanted = name.split()
        if all(word in words for word in wanted):
            return peak
    return None


def mfu(
    flops_per_sample: float, samples_per_second: float, peak: float | None, world_size: int
) -> float | None:
    """Model-FLOPs utilisation: what the model needs over what the devices could; None: unknown.

    flops_per_sample: forward and backward of one sample, without anything computed twice
    (PaLM, https://arxiv.org/abs/2204.02311, appendix B)
    """
    if peak is None:
        return None
    return flops_per_sample * samples_per_second / (peak * world_size)


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A host copy of `values`, and the event after which it may be read."""
    if not values.is_cuda:
        return values.clone(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(values.device))
    return host, event
