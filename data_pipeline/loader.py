"""Batches ahead of the step: a thread reads and decodes, the trainer takes; the state is one
position."""

import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.augment import draw_flips
from data_pipeline.decode.decoder import Decoder
from data_pipeline.faults import Bad, BadSample, Budget, Found, Quarantine, Rows, Tolerance
from data_pipeline.samples import Samples
from data_pipeline.stream import Stream
from flows.batch import Batch
from flows.errors import UserError

# How long a thread that waits for room in the queue takes to notice that it shall stop.
POLL_SECONDS = 0.05
# Batches whose bytes are on their way while this one is decoded. Remote neighbours come in one request.
LOOKAHEAD = 4


@dataclass(frozen=True)
class Loaded:
    """A rank's share of a batch, and the bad samples that were replaced in it."""

    batch: Batch
    bad: list[Bad]


class Share:
    """This rank's share of any global batch: no state but the open files."""

    def __init__(
        self,
        stream: Stream,
        decoder: Decoder,
        *,
        seed: int,
        batch: int,
        rank: int,
        ranks: int,
        flip: float,
        device: torch.device,
    ) -> None:
        if not 0 <= rank < ranks <= batch:
            raise UserError(
                f"train.batch = {batch} gives no sample to some of {ranks} ranks; raise it or use "
                "fewer ranks"
            )
        self.stream = stream
        self.decoder = decoder
        self.seed = seed
        self.batch = batch
        self.first, self.end = (batch * r // ranks for r in (rank, rank + 1))
        self.flip = flip
        self.device = device
        # Where the next batch begins if nobody goes elsewhere, and up to where all is named.
        self._next = self._named = -1

    def load(self, start: int) -> Loaded:
        """Samples `first` to `end` of the global batch that begins at position `start`."""
        if self.device.type == "cuda":
            # A new thread begins on device 0, whichever device this rank has.
            torch.cuda.set_device(self.device)
        self._look_ahead(start)
        positions = self._positions(start)
        flip = draw_flips(positions, seed=self.seed, probability=self.flip)
        rows = Rows(self.stream, positions, tolerant=not self.stream.tolerate.strict)

        image = rows.apply(lambda chosen: self._decode(rows, chosen, flip))
        labels = torch.tensor([one.label for one in rows.samples])
        parts = [image, labels, positions]
        if self.device.type == "cuda":
            parts = [part if part.is_cuda else part.pin_memory() for part in parts]
        return Loaded(Batch(*parts), rows.bad)

    def _decode(self, rows: Rows, chosen: Sequence[int], flip: NDArray[np.bool_]) -> Tensor:
        samples = [rows.samples[row] for row in chosen]
        images, names = [one.image for one in samples], [one.name for one in samples]
        return self.decoder.decode(images, flip=flip[list(chosen)], names=names)

    def _positions(self, start: int) -> Tensor:
        return torch.arange(start + self.first, start + self.end)

    def _look_ahead(self, start: int) -> None:
        """Name what the next batches need, several at a time so that neighbours meet."""
        if start != self._next:
            self.stream.forget()
            self._named = start
        self._next = start + self.batch
        if start >= self._named:
            self._named = start + LOOKAHEAD * self.batch
            starts = range(start, self._named, self.batch)
            self.stream.expect(torch.cat([self._positions(one) for one in starts]))


class Ahead:
    """A thread that loads batches from a position on: `prefetch` in the queue and one in hand."""

    def __init__(self, share: Share, *, start: int, prefetch: int) -> None:
        self._share = share
        self._start = start
        self._stopped = threading.Event()
        self._ready: queue.Queue[Loaded | BaseException] = queue.Queue(prefetch)
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        return self._ready.qsize()

    def take(self) -> Loaded:
        """The next batch; raises what loading it raised."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        start = self._start
        while not self._stopped.is_set():
            item: Loaded | BaseException
            try:
                item = self._share.load(start)
            # Whatever it was belongs to the thread that waits for this batch.
            except BaseException as error:  # noqa: BLE001
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return
            start += self._share.batch

    def _put(self, item: Loaded | BaseException) -> None:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return
            except queue.Full:
                continue


class Loader:
    """An endless iterator of this rank's share of each global batch.

    Share of the batch of `batch` samples from position p: p + [rank * batch / ranks, (rank + 1) *
    batch / ranks), rounded down. Reading starts with the first `next`.

    position: samples of the global stream that the trainer has taken, on all ranks together
    wait_seconds: how long the last `next` waited
    queue_depth: batches that were ready when it was called
    bad_samples: samples of this rank's share of the last batch that were replaced

    Raises UserError from `next` for a bad sample, naming it, or for more of them than the stream
    tolerates in an epoch.
    """

    def __init__(
        self,
        stream: Stream,
        decoder: Decoder,
        *,
        seed: int,
        batch: int,
        rank: int,
        ranks: int,
        flip: float,
        prefetch: int,
        device: torch.device,
    ) -> None:
        self.stream = stream
        self.share = Share(
            stream,
            decoder,
            seed=seed,
            batch=batch,
            rank=rank,
            ranks=ranks,
            flip=flip,
            device=device,
        )
        self.prefetch = prefetch
        self.position = 0
        self.wait_seconds = 0.0
        self.queue_depth = 0
        self.bad_samples = 0
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
            # Also when the loader is forgotten, and before the interpreter goes down.
            self._stop = weakref.finalize(self, self._ahead.stop)
        self.queue_depth = self._ahead.depth
        try:
            loaded = self._ahead.take()
            # Not when it was loaded: what is never taken has not been part of the run.
            self._quarantine.add_samples(loaded.bad)
            self._budget.add(self.position, len(loaded.bad))
        except BaseException:
            self._stop_ahead()
            raise
        self.position += self.share.batch
        self.bad_samples = len(loaded.bad)
        self.wait_seconds = time.perf_counter() - began
        return loaded.batch

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, on any number of ranks."""
        return {
            "position": self.position,
            "samples": self.stream.samples,
            "fingerprint": self.stream.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; raises UserError if it belongs to another order of samples."""
        if state["fingerprint"] != self.stream.fingerprint:
            raise UserError(
                f"the checkpoint was made with another stream of samples ({state['samples']} an "
                f"epoch, here {self.stream.samples}); restore data.train, data.lanes, data.window "
                "and seed, or start in a new run.dir"
            )
        self._stop_ahead()
        self.position = int(state["position"])

    def close(self) -> None:
        """Stop the thread, then close decoder and files."""
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


def read_all(
    pattern: str,
    decoder: Decoder,
    *,
    classes: int,
    limit: int | None,
    batch: int,
    tolerate: Tolerance | None = None,
) -> tuple[Tensor, Tensor]:
    """The first `limit` samples in file order, for evaluation.

    batch: images decoded at a time
    tolerate: where it allows bad samples, the next good one is taken once more; None: none
    Returns images (samples, channels, image_size, image_size) in [-1, 1] and labels (samples,) on CPU
    """
    contents = Samples(pattern, classes=classes, tolerate=tolerate)
    images, labels = [], []
    total = len(contents) if limit is None else min(limit, len(contents))
    for start in range(0, total, batch):
        positions = torch.arange(start, min(start + batch, total))
        rows = Rows(
            InFileOrder(contents), positions, tolerant=bool(tolerate and not tolerate.strict)
        )
        images.append(rows.apply(partial(_decode, decoder, rows)))
        labels.append(torch.tensor([one.label for one in rows.samples]))
    contents.close()
    return torch.cat(images), torch.cat(labels)


def _decode(decoder: Decoder, rows: Rows, chosen: Sequence[int]) -> Tensor:
    samples = [rows.samples[row] for row in chosen]
    flip = np.zeros(len(samples), np.bool_)
    names = [one.name for one in samples]
    return decoder.decode([one.image for one in samples], flip=flip, names=names).cpu()


class InFileOrder:
    """Samples by their place in the shards, one after another."""

    def __init__(self, contents: Samples) -> None:
        self._contents = contents
        self._ends = np.cumsum(contents.sizes)

    def fetch(self, positions: Tensor, attempts: Tensor) -> list[Found | BadSample]:
        """In the place of a bad one comes the next."""
        place = (positions + attempts).numpy() % len(self._contents)
        shard = np.searchsorted(self._ends, place, side="right")
        first = self._ends[shard] - np.asarray(self._contents.sizes)[shard]
        return self._contents.fetch(shard, place - first)
