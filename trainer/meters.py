"""What a step tells about itself without waiting: late readings, and utilisation.

Reading a number that lies on a device stops the host until the device has caught up. `Readout`
therefore copies the numbers of step s behind the step's own work and hands them out in step s + 1.
"""

from collections.abc import Mapping
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
