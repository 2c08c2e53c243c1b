"""Batches ahead of the step: one thread reads, one decodes, the trainer takes; the state is one
position."""

import atexit
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import psutil

from data_pipeline.augment import Size
from data_pipeline.faults import Budget, Quarantine
from data_pipeline.share import Loaded, Share, Undecoded
from data_pipeline.stage import Stage, Stopped
from flows.batch import Batch
from flows.errors import UserError

# While the pixels of one batch are finished, the next one is decoded.
DECODED_AT_ONCE = 2


def check_memory(*, batch: int, channels: int, size: Size, batches: int) -> None:
    """Raises UserError if so many batches of this rank are more than the machine's memory."""
    needed = batches * batch * channels * size[0] * size[1] * 4
    there = psutil.virtual_memory().total
    if needed > there:
        raise UserError(
            f"train.batch gives a rank {batch:,} samples, and {batches} such batches that lie ready need "
            f"{needed / 2**30:,.0f} GiB, more than the {there / 2**30:,.0f} GiB of this machine; lower "
            "train.batch or data.prefetch"
        )


class Ahead:
    """Batches from position `start` on: up to `prefetch` read, and as many decoded, before they are
    asked for.

    The first has the cores to itself, since a run that goes on waits for it: the next are read once it is
    decoded.
    """

    def __init__(self, share: Share, *, start: int, prefetch: int) -> None:
        self._share = share
        self._starts = itertools.count(start, share.batch)
        self._first = start
        self._stopped = False
        self._first_is_over = threading.Event()
        self.reading = Stage(self._begin, share.read, depth=prefetch, workers=1, name="reader")
        self.decoding = Stage(
            self.reading.take, self._decode, depth=prefetch, workers=DECODED_AT_ONCE, name="decoder"
        )
        # DALI too takes itself down when the interpreter ends, after what was registered later.
        atexit.register(self.stop)

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self._stopped = True
        self._first_is_over.set()
        self.reading.stop()
        self.decoding.stop()

    def _begin(self) -> int:
        start = next(self._starts)
        if start != self._first:
            self._first_is_over.wait()
        if self._stopped:
            raise Stopped
        return start

    def _decode(self, read: Undecoded) -> Loaded:
        # If this raises it is the last that comes: whoever takes it stops what waits here.
        loaded = self._share.decode(read)
        self._first_is_over.set()
        return loaded


class Loader:
    """An endless iterator of this rank's share of each global batch.

    Reading starts with the first `next`.

    prefetch: batches that may lie ready, read and decoded
    position: samples of the global stream that the trainer has taken, on all ranks together
    wait_seconds: how long the last `next` waited
    queue_depth: batches that were decoded when it was called
    read_depth: batches that had been read then and still were to be decoded
    redecoded: images so far that the decoder could decode only in a second way
    bad_samples: samples of this rank's share of the last batch that were replaced

    Raises UserError from `next` for a bad sample, naming it, or for more of them than the stream
    tolerates in an epoch.
    """

    def __init__(self, share: Share, *, prefetch: int) -> None:
        check_memory(
            # Of the largest share: all ranks refuse, or none.
            batch=-(-share.batch // share.ranks),
            channels=share.decoder.channels,
            size=share.size,
            batches=prefetch + 2,
        )
        self.stream = stream = share.stream
        self.share = share
        self.prefetch = prefetch
        self.position = 0
        self.wait_seconds = 0.0
        self.queue_depth = 0
        self.read_depth = 0
        self.redecoded = 0
        self.bad_samples = 0
        # Of this rank's share, for loaders without training; that counts all ranks' by Telemetry, which is
        # told only every few steps.
        self._budget = Budget(stream.tolerate.max_bad_fraction, stream.samples)
        self._quarantine = Quarantine(stream.tolerate.report)
        self._ahead: Ahead | None = None
        self._stop: weakref.finalize[Any, Any] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        if self._ahead is None:
            self._ahead = Ahead(self.share, start=self.position, prefetch=self.prefetch)
            # Also when the loader is forgotten.
            self._stop = weakref.finalize(self, self._ahead.stop)
        self.queue_depth = self._ahead.decoding.ready
        self.read_depth = self._ahead.reading.ready
        try:
            loaded = self._ahead.decoding.take()
            # Not when it was loaded: what is never taken has not been part of the run.
            self._quarantine.add_samples(loaded.bad)
            self._budget.add(self.position, len(loaded.bad))
        except BaseException:
            self._stop_ahead()
            raise
        self.position += self.share.batch
        self.redecoded = self.share.decoder.redecoded
        self.bad_samples = len(loaded.bad)
        self.wait_seconds = time.perf_counter() - began
        return loaded.batch

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, on any number of ranks."""
        return self.stream.state_at(self.position)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; raises UserError if it belongs to another order of samples."""
        if state != self.stream.state_at(int(state["position"])):
            there, here = (
                " + ".join(str(count) for count in counts)
                for counts in (state["samples"], self.stream.epochs)
            )
            raise UserError(
                f"the checkpoint was made with another stream of samples ({there} an epoch, here "
                f"{here}); restore data.train, data.keep, data.lanes, data.window and seed, or start "
                "in a new run.dir"
            )
        self._stop_ahead()
        self.position = int(state["position"])

    def close(self) -> None:
        """Stop the threads, then close decoder and files."""
        self._stop_ahead()
        self.share.decoder.close()
        self.stream.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stop_ahead(self) -> None:
        if self._stop is not None:
            self._stop()
        self._ahead = self._stop = None
