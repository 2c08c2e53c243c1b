"""Threads that make one thing after another, a few ahead of whoever takes them, in order."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from typing import Generic, TypeVar

S = TypeVar("S")
T = TypeVar("T")

# How long a thread that waits for another takes to notice that it shall stop.
POLL_SECONDS = 0.05


class Stopped(Exception):
    """Nothing more will come of a stage that was stopped."""


class Stage(Generic[S, T]):
    """What `make` makes of one thing after another that `begin` gives, ready before it is taken.

    At most `depth` results wait; one more is in the making, or was made last. Results come in the
    order in which they were begun, whichever of the `workers` is done first. What is raised is raised by
    `take` in its turn, and is the last that comes.
    """

    def __init__(
        self,
        begin: Callable[[], S],
        make: Callable[[S], T],
        *,
        depth: int,
        workers: int,
        name: str,
    ) -> None:
        self._begin, self._make = begin, make
        self._stopped = threading.Event()
        self._results: queue.Queue[Future[T]] = queue.Queue(depth + 1)
        self._turn = threading.Lock()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def ready(self) -> int:
        """Results that wait to be taken."""
        with self._results.mutex:
            return sum(result.done() for result in self._results.queue)

    def take(self) -> T:
        """The next result; raises what making it raised, or Stopped."""
        result: Future[T] | None = None
        while not self._stopped.is_set():
            try:
                result = result or self._results.get(timeout=POLL_SECONDS)
                return result.result(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            except TimeoutError:
                # The result's own error may be one of these, too.
                if result is not None and result.done():
                    return result.result()
        raise Stopped

    def stop(self) -> None:
        """End the threads; returns when they have ended."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (begun := self._next()) is not None:
            item, result = begun
            try:
                result.set_result(self._make(item))
            # Whatever it was belongs to the thread that waits for this result.
            except BaseException as error:  # noqa: BLE001
                result.set_exception(error)
                return

    def _next(self) -> tuple[S, "Future[T]"] | None:
        """The next thing to work on, and its place among the results; None when there is no more."""
        with self._turn:
            result: Future[T] = Future()
            if not self._reserve(result):
                return None
            try:
                return self._begin(), result
            except BaseException as error:  # noqa: BLE001
                result.set_exception(error)
                return None

    def _reserve(self, result: "Future[T]") -> bool:
        while not self._stopped.is_set():
            try:
                self._results.put(result, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
