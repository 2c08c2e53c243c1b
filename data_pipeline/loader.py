"""Batches ahead of the step: one thread reads, one decodes, the trainer takes; the state is one
position."""

import atexit
import itertools
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.augment import Augment, Size, Views, draw_views
from data_pipeline.decode.decoder import Decoder, decode_middle
from data_pipeline.decode.images import Picture
from data_pipeline.samples import Samples
from data_pipeline.stage import Stage
from data_pipeline.stream import Stream
from flows.batch import Batch
from flows.errors import UserError


@dataclass(frozen=True)
class Undecoded:
    """A batch that has been read, and all that decides what it will look like."""

    pictures: list[Picture]
    views: Views
    labels: Tensor
    positions: Tensor


class Share:
    """This rank's share of any global batch: no state but the open files."""

    def __init__(
        self,
        stream: Stream,
        decoder: Decoder,
        *,
        size: Size,
        augment: Augment,
        seed: int,
        batch: int,
        rank: int,
        ranks: int,
        device: torch.device,
    ) -> None:
        if not 0 <= rank < ranks <= batch:
            raise UserError(
                f"train.batch = {batch} gives no sample to some of {ranks} ranks; raise it or use "
                "fewer ranks"
            )
        self.stream = stream
        self.decoder = decoder
        self.size = size
        self.augment = augment
        self.seed = seed
        self.batch = batch
        self.first, self.end = (batch * r // ranks for r in (rank, rank + 1))
        self.device = device

    def read(self, start: int) -> Undecoded:
        """Samples `first` to `end` of the global batch that begins at position `start`."""
        positions = torch.arange(start + self.first, start + self.end)
        encoded = self.stream.read(positions)
        pictures = self.decoder.open(encoded.images, encoded.names)
        sizes = [picture.size for picture in pictures]
        views = draw_views(sizes, self.size, self.augment, seed=self.seed, positions=positions)
        return Undecoded(pictures, views, torch.from_numpy(encoded.labels), positions)

    def decode(self, read: Undecoded) -> Batch:
        if self.device.type == "cuda":
            # A new thread begins on device 0, whichever device this rank has.
            torch.cuda.set_device(self.device)
        image = self.decoder.decode(read.pictures, read.views)
        parts = [image, read.labels, read.positions]
        if self.device.type == "cuda":
            parts = [
                part if part.is_cuda or part.is_pinned() else part.pin_memory() for part in parts
            ]
        return Batch(*parts)


class Ahead:
    """Batches from position `start` on: up to `prefetch` read, and as many decoded, before they are
    asked for."""

    def __init__(self, share: Share, *, start: int, prefetch: int) -> None:
        starts = itertools.count(start, share.batch)
        self.reading = Stage(lambda: share.read(next(starts)), depth=prefetch, name="reader")
        self.decoding = Stage(
            lambda: share.decode(self.reading.take()), depth=prefetch, name="decoder"
        )
        # DALI too takes itself down when the interpreter ends, after what was registered later.
        atexit.register(self.stop)

    def stop(self) -> None:
        atexit.unregister(self.stop)
        self.reading.stop()
        self.decoding.stop()


class Loader:
    """An endless iterator of this rank's share of each global batch.

    Share of the batch of `batch` samples from position p: p + [rank * batch / ranks, (rank + 1) *
    batch / ranks), rounded down. Reading starts with the first `next`.

    position: samples of the global stream that the trainer has taken, on all ranks together
    wait_seconds: how long the last `next` waited
    queue_depth: batches that were decoded when it was called
    read_depth: batches that had been read then and still were to be decoded
    redecoded: images so far that the decoder could decode only in a second way

    Raises UserError from `next` for a bad sample, naming it.
    """

    def __init__(
        self,
        stream: Stream,
        decoder: Decoder,
        *,
        size: Size,
        augment: Augment,
        seed: int,
        batch: int,
        rank: int,
        ranks: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        self.stream = stream
        self.share = Share(
            stream,
            decoder,
            size=size,
            augment=augment,
            seed=seed,
            batch=batch,
            rank=rank,
            ranks=ranks,
            device=device,
        )
        self.prefetch = prefetch
        self.position = 0
        self.wait_seconds = 0.0
        self.queue_depth = 0
        self.read_depth = 0
        self.redecoded = 0
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
            batch = self._ahead.decoding.take()
        except BaseException:
            self._stop_ahead()
            raise
        self.position += self.share.batch
        self.redecoded = self.share.decoder.redecoded
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


def read_all(
    pattern: str, decoder: Decoder, *, size: Size, classes: int, limit: int | None, batch: int
) -> tuple[Tensor, Tensor]:
    """The first `limit` samples in file order, for evaluation.

    batch: images decoded at a time

    Returns images (samples, channels, *size) in [-1, 1] and labels (samples,), on the CPU.
    """
    contents = Samples(pattern, classes=classes)
    counts = np.array(contents.sizes)
    shard = np.repeat(np.arange(len(counts)), counts)
    sample = np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)
    images, labels = [], []
    for start in range(0, len(shard) if limit is None else min(limit, len(shard)), batch):
        part = slice(start, min(start + batch, limit or len(shard)))
        encoded = contents.read(shard[part], sample[part])
        images.append(decode_middle(decoder, encoded.images, encoded.names, size).cpu())
        labels.append(torch.from_numpy(encoded.labels))
    contents.close()
    return torch.cat(images), torch.cat(labels)
