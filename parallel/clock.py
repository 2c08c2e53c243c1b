"""Where a step's time goes, without making the device wait.

On the CPU a phase is the wall time inside it. On CUDA the work of a phase is still queued when the
block ends, so a pair of events marks it on the stream, and a phase is counted once its end event
has been reached: perhaps one step later, never by waiting.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds of named phases since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`; blocks of one name add up."""
        if not self._on_device:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._add(name, time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._pending.append((name, begin, end))

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call; what the device has not finished comes later."""
        while self._pending and self._pending[0][2].query():
            name, begin, end = self._pending.popleft()
            self._add(name, begin.elapsed_time(end) / 1000)
        taken, self._seconds = self._seconds, {}
        return taken

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
