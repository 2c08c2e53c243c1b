"""A thread that makes one thing after another, a few ahead of whoever takes them."""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# How long a thread that waits for another takes to notice that it shall stop.
POLL_SECONDS = 0.05


class Stopped(Exception):
    """Nothing more will come of a stage that was stopped."""


class Stage(Generic[T]):
    """Calls `make` again and again; `depth` results wait in a queue and one in its hand.

    What `make` raises is raised by `take` in its turn, and is the last that comes.
    """

    def __init__(self, make: Callable[[], T], *, depth: int, name: str) -> None:
        self._make = make
        self._stopped = threading.Event()
        self._ready: queue.Queue[T | BaseException] = queue.Queue(depth)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def ready(self) -> int:
        """Results that wait to be taken."""
        return self._ready.qsize()

    def take(self) -> T:
        """The next result; raises what making it raised, or Stopped."""
        while not self._stopped.is_set():
            try:
                item = self._ready.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            return item
        raise Stopped

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            item: T | BaseException
            try:
                item = self._make()
            # Whatever it was belongs to the thread that waits for this result.
            except BaseException as error:  # noqa: BLE001
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return

    def _put(self, item: T | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue
