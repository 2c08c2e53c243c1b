"""A side of the comparison in a process of its own: none pays for the memory, threads or forks of others."""

import itertools
import os
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, set_start_method
from typing import Any, TypeVar

from benchmarks.loader_shards import Shards
from benchmarks.loader_sides import Setting, Side

# More batches than any side holds ready before it is first asked; and some that are never asked for, so
# that no side comes to its end while it is timed.
WARM_UP, TIMED, SPARE = 12, 36, 12
# Decoders may round differently; a wrong image, or a wrong place, is off by tenths.
TOLERANCE = 2 / 255
AWAKE_SECONDS = 0.3

T = TypeVar("T")


class Apart:
    """A side that reads shards; making one raises ImportError where it is not installed.

    kind: the class of the side
    """

    def __init__(self, kind: type[Any], shards: Shards, setting: Setting) -> None:
        self.kind = kind
        self.name: str = kind.name
        self.setting = setting
        # Not forked: a child begins with nothing of this process.
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        try:
            self.take(shards)
        except BaseException:
            self.close()
            raise

    def take(self, shards: Shards) -> None:
        """Read these shards from now on."""
        self._call(_make, self.kind, shards, self.setting)

    def difference(self) -> float:
        """See `check_images`."""
        return self._call(_difference)

    def speed(self) -> float:
        """See `time_batches`."""
        return self._call(_speed)

    def reach(self, batches: int) -> None:
        """Have the state after so many batches, for `resume`."""
        self._call(_reach, batches)

    def resume(self) -> float:
        """See `time_resume`."""
        return self._call(_resume)

    def close(self) -> None:
        self._process.shutdown()

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return self._process.submit(function, *arguments).result()


def time_batches(side: Side, batch: int) -> float:
    """Samples a second, after the queues have been filled and emptied once."""
    iterator = side.open(None)
    for _ in itertools.islice(iterator, WARM_UP):
        pass
    began = time.perf_counter()
    count = sum(1 for _ in itertools.islice(iterator, TIMED))
    seconds = time.perf_counter() - began
    iterator.close()
    return count * batch / seconds


def time_resume(side: Side, state: Any) -> float:
    """Seconds from opening the data to the first batch from `state`, on cores that are awake."""
    _keep_busy()
    began = time.perf_counter()
    iterator = side.open(state)
    next(iterator)
    seconds = time.perf_counter() - began
    iterator.close()
    return seconds


def check_images(side: Side, shards: Shards) -> float:
    """The largest mean difference of an image of the first batches from pillow's.

    Raises ValueError where a side hands over other images than it says.
    """
    iterator = side.open(None)
    largest = 0.0
    for images, labels in itertools.islice(iterator, 3):
        for image, label in zip(images, labels.tolist(), strict=True):
            largest = max(largest, float((image - shards.decoded(label)).abs().mean()))
    iterator.close()
    if largest > TOLERANCE:
        raise ValueError(f"{side.name}: an image differs by {largest:.3f} from what pillow decodes")
    return largest


def _keep_busy() -> None:
    """Our cores, for a moment: for some milliseconds after a sleep they run at half their speed."""
    end = time.perf_counter() + AWAKE_SECONDS
    content = bytes(1 << 20)

    def work() -> None:
        while time.perf_counter() < end:
            zlib.crc32(content)  # which lets other threads go on

    threads = [threading.Thread(target=work) for _ in os.sched_getaffinity(0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# What a side's own process holds from call to call: the side, its shards and setting, and a state.
_held: dict[str, Any] = {}


def _make(kind: type[Any], shards: Shards, setting: Setting) -> None:
    # Its own workers are forked, as where nobody asks for something else: that is the quickest.
    set_start_method("fork", force=True)
    _held.update(side=kind(shards, setting), shards=shards, setting=setting)


def _difference() -> float:
    return check_images(_held["side"], _held["shards"])


def _speed() -> float:
    return time_batches(_held["side"], _held["setting"].batch)


def _reach(batches: int) -> None:
    _held["state"] = _held["side"].state_after(batches)


def _resume() -> float:
    return time_resume(_held["side"], _held["state"])
