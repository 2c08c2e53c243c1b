"""Batches ahead of the step: a thread reads and decodes, the trainer takes; the state is one
position."""

import queue
import threading
import time
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.augment import draw_flips
from data_pipeline.decode.decoder import Decoder
from data_pipeline.samples import Samples
from data_pipeline.stream import Stream
from flows.batch import Batch
from flows.errors import UserError

# How long a thread that waits for room in the queue takes to notice that it shall stop.
POLL_SECONDS = 0.05


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

    def load(self, start: int) -> Batch:
        """Samples `first` to `end` of the global batch that begins at position `start`."""
        if self.device.type == "cuda":
            # A new thread begins on device 0, whichever device this rank has.
            torch.cuda.set_device(self.device)
        positions = torch.arange(start + self.first, start + self.end)
        encoded = self.stream.read(positions)
        flip = draw_flips(positions, seed=self.seed, probability=self.flip)
        image = self.decoder.decode(encoded.images, flip=flip, names=encoded.names)
        parts = [image, torch.from_numpy(encoded.labels), positions]
        if self.device.type == "cuda":
            parts = [part if part.is_cuda else part.pin_memory() for part in parts]
        return Batch(*parts)


class Ahead:
    """A thread that loads batches from a position on: `prefetch` in the queue and one in hand."""

    def __init__(self, share: Share, *, start: int, prefetch: int) -> None:
        self._share = share
        self._start = start
        self._stopped = threading.Event()
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(prefetch)
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        return self._ready.qsize()

    def take(self) -> Batch:
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
            item: Batch | BaseException
            try:
                item = self._share.load(start)
            # Whatever it was belongs to the thread that waits for this batch.
            except BaseException as error:  # noqa: BLE001
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return
            start += self._share.batch

    def _put(self, item: Batch | BaseException) -> None:
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

    Raises UserError from `next` for a bad sample, naming it.
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
            batch = self._ahead.take()
        except BaseException:
            self._stop_ahead()
            raise
        self.position += self.share.batch
        self.wait_seconds = time.perf_counter() - began
        return batch

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
    pattern: str, decoder: Decoder, *, classes: int, limit: int | None, batch: int
) -> tuple[Tensor, Tensor]:
    """The first `limit` samples in file order, for evaluation.

    batch: images decoded at a time Returns images (samples, channels, image_size, image_size) in
    [-1, 1] and labels (samples,) on CPU
    """
    contents = Samples(pattern, classes=classes)
    counts = np.array(contents.sizes)
    shard = np.repeat(np.arange(len(counts)), counts)
    sample = np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)
    images, labels = [], []
    for start in range(0, len(shard) if limit is None else min(limit, len(shard)), batch):
        part = slice(start, min(start + batch, limit or len(shard)))
        encoded = contents.read(shard[part], sample[part])
        flip = np.zeros(len(encoded.images), np.bool_)
        images.append(decoder.decode(encoded.images, flip=flip, names=encoded.names).cpu())
        labels.append(torch.from_numpy(encoded.labels))
    contents.close()
    return torch.cat(images), torch.cat(labels)
