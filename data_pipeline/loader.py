"""Batches ahead of the step: one thread reads, one decodes, the trainer takes; the state is one
position."""

import atexit
import itertools
import math
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from data_pipeline.augment import Augment, Size, Views, draw_views
from data_pipeline.decode.decoder import Decoder, decode_middle
from data_pipeline.decode.images import Picture
from data_pipeline.faults import Bad, BadSample, Budget, Found, Quarantine, Rows, Tolerance
from data_pipeline.keep import Keep
from data_pipeline.mixture import Located
from data_pipeline.stage import Stage, Stopped
from data_pipeline.stream import DataSet, Stream, open_set
from data_pipeline.texts import TextMember
from flows.batch import Batch
from flows.errors import UserError

# Batches whose bytes are on their way while this one is decoded. Remote neighbours come in one request.
LOOKAHEAD = 4
# While the pixels of one batch are finished, the next one is decoded.
DECODED_AT_ONCE = 2


@dataclass(frozen=True)
class Undecoded:
    """A batch that has been read.

    rows: its samples, which may still be replaced
    pictures: their headers as they were read
    """

    rows: Rows
    pictures: list[Picture]
    positions: Tensor


@dataclass(frozen=True)
class Loaded:
    """A rank's share of a batch, and the bad samples that were replaced in it."""

    batch: Batch
    bad: list[Bad]


def share_of(batch: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and end of what `rank` reads of a global batch: rank * batch / ranks, rounded down."""
    return batch * rank // ranks, batch * (rank + 1) // ranks


@dataclass(frozen=True)
class SharedOut:
    """One global batch: the position it begins at, and the keys that each rank reads of it."""

    position: int
    ranks: list[list[str]]


def list_shares(
    stream: Stream, *, start: int, batches: int, batch: int, ranks: int
) -> list[SharedOut]:
    """Who reads what of the global batches from position `start` on."""
    listed = []
    for position in range(start, start + batches * batch, batch):
        keys = stream.keys(torch.arange(position, position + batch))
        shares = [keys[slice(*share_of(batch, rank, ranks))] for rank in range(ranks)]
        listed.append(SharedOut(position, shares))
    return listed


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
        self.first, self.end = share_of(batch, rank, ranks)
        self.device = device
        # The thread that decodes reads too, where it has to replace what cannot be decoded.
        self._reading = threading.Lock()
        # Where the next batch begins if nobody goes elsewhere; and, by the first position of a share,
        # where the samples of the next few lie.
        self._next = -1
        self._located: dict[int, Located] = {}

    def read(self, start: int) -> Undecoded:
        """Samples `first` to `end` of the global batch that begins at position `start`."""
        self._look_ahead(start)
        positions = self._positions(start)
        rows = Rows(self, positions, tolerant=not self.stream.tolerate.strict)
        return Undecoded(rows, rows.apply(partial(self._open, rows)), positions)

    def decode(self, read: Undecoded) -> Loaded:
        if self.device.type == "cuda":
            # A new thread begins on device 0, whichever device this rank has.
            torch.cuda.set_device(self.device)
        image = read.rows.apply(partial(self._decode, read))
        samples = read.rows.samples
        labels = torch.tensor([one.label for one in samples])
        extras = {}
        if self.stream.text is not None:
            words = [one.words for one in samples if one.words is not None]
            extras["text"] = self._pinned(self.stream.text.stack(words))
        batch = Batch(
            self._pinned(image), self._pinned(labels), self._pinned(read.positions), extras
        )
        return Loaded(batch, read.rows.bad)

    def _pinned(self, part: Tensor) -> Tensor:
        """Where a CUDA device copies from without waiting."""
        if self.device.type != "cuda" or part.is_cuda or part.is_pinned():
            return part
        return part.pin_memory()

    def fetch(self, positions: Tensor, attempts: Tensor) -> list[Found | BadSample]:
        """As the stream does, for the thread that reads and for the one that decodes."""
        with self._reading:
            located = None if attempts.any() else self._located.pop(int(positions[0]), None)
            return self.stream.fetch_at(located or self.stream.locate(positions, attempts))

    def _open(self, rows: Rows, chosen: Sequence[int]) -> list[Picture]:
        return self.decoder.open(*_files(rows, chosen))

    def _decode(self, read: Undecoded, chosen: Sequence[int]) -> Tensor:
        pictures, samples = read.pictures, read.rows.samples
        if all(pictures[row].content is samples[row].image for row in chosen):
            pictures = [pictures[row] for row in chosen]
        else:
            pictures = self._open(read.rows, chosen)
        return self.decoder.decode(pictures, self._views(pictures, read.positions[list(chosen)]))

    def _views(self, pictures: Sequence[Picture], positions: Tensor) -> Views:
        sizes = [picture.size for picture in pictures]
        # A share lies within one global batch, whose places have one size.
        target = self.stream.size_at(int(positions[0])) or self.size
        return draw_views(sizes, target, self.augment, seed=self.seed, positions=positions)

    def _positions(self, start: int) -> Tensor:
        return torch.arange(start + self.first, start + self.end)

    def _look_ahead(self, start: int) -> None:
        """Find out where the next batches lie, several at a time: that takes little longer than for one,
        and neighbours on remote storage meet."""
        with self._reading:
            if start != self._next:
                self.stream.forget()
                self._located = {}
            self._next = start + self.batch
            if start + self.first not in self._located:
                starts = range(start, start + LOOKAHEAD * self.batch, self.batch)
                located = self.stream.locate(torch.cat([self._positions(one) for one in starts]))
                firsts = (one + self.first for one in starts)
                parts = located.split(self.end - self.first)
                self._located = dict(zip(firsts, parts, strict=True))
                if self.stream.remote:
                    self.stream.expect(located)


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

    Of the batch of `batch` samples from position p it reads p + `share_of`(batch, rank, ranks). Images
    have (height, width) `size`, or that of the stream's bucket.
    Reading starts with the first `next`.

    position: samples of the global stream that the trainer has taken, on all ranks together
    wait_seconds: how long the last `next` waited
    queue_depth: batches that were decoded when it was called
    read_depth: batches that had been read then and still were to be decoded
    redecoded: images so far that the decoder could decode only in a second way
    bad_samples: samples of this rank's share of the last batch that were replaced

    Raises UserError from `next` for a bad sample, naming it, or for more of them than the stream
    tolerates in an epoch.
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
        check_memory(
            batch=-(-batch // ranks), channels=decoder.channels, size=size, batches=prefetch + 2
        )
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


def read_all(
    patterns: Sequence[str],
    decoder: Decoder,
    *,
    size: Size,
    keep: Keep,
    classes: int,
    limit: int | None,
    batch: int,
    tolerate: Tolerance | None = None,
) -> tuple[Tensor, Tensor]:
    """The first `limit` samples in file order, for evaluation.

    keep: see `open_stream`
    batch: images decoded at a time
    tolerate: where it allows bad samples, the next good one is taken once more; None: none

    Returns images (samples, channels, *size) in [-1, 1] and labels (samples,) on CPU
    """
    tolerate = tolerate or Tolerance(0.0, None, None)
    images, labels = [], []
    left = math.inf if limit is None else limit
    for number, pattern in enumerate(patterns):
        tolerated = tolerate.of_set(number)
        source = open_set(pattern, 1.0, keep=keep, classes=classes, tolerate=tolerated)
        count = int(min(left, sum(source.sizes)))
        for start in range(0, count, batch):
            positions = torch.arange(start, min(start + batch, count))
            rows = Rows(InFileOrder(source), positions, tolerant=not tolerate.strict)
            images.append(rows.apply(partial(_decode_middle, decoder, rows, size)))
            labels.append(torch.tensor([one.label for one in rows.samples]))
        source.contents.close()
        left -= count
    return torch.cat(images), torch.cat(labels)


def texts_in_file_order(
    pattern: str, places: Tensor, text: TextMember, *, classes: int, tolerate: Tolerance
) -> tuple[Tensor, Tensor]:
    """Labels (n,) and embedded captions (n, tokens, width) of the samples at (n,) places of some shards.

    places: in the order of the shards; beyond their end they begin again
    """
    source = open_set(pattern, 1.0, keep={}, classes=classes, tolerate=tolerate, text=text)
    try:
        rows = Rows(InFileOrder(source), places, tolerant=not tolerate.strict)
        samples = rows.samples
        labels = torch.tensor([one.label for one in samples])
        return labels, text.stack([one.words for one in samples if one.words is not None])
    finally:
        source.contents.close()


def _decode_middle(decoder: Decoder, rows: Rows, size: Size, chosen: Sequence[int]) -> Tensor:
    return decode_middle(decoder, *_files(rows, chosen), size).cpu()


def _files(rows: Rows, chosen: Sequence[int]) -> tuple[list[bytes], list[str]]:
    """Image files and what to call them."""
    samples = rows.samples
    return [samples[row].image for row in chosen], [samples[row].name for row in chosen]


class InFileOrder:
    """Samples by their place in the shards, one after another."""

    def __init__(self, source: DataSet) -> None:
        self._source = source
        self._ends = np.cumsum(source.sizes)

    def fetch(self, positions: Tensor, attempts: Tensor) -> list[Found | BadSample]:
        """In the place of a bad one comes the next."""
        place = (positions + attempts).numpy() % self._ends[-1]
        shard = np.searchsorted(self._ends, place, side="right")
        first = self._ends[shard] - np.asarray(self._source.sizes)[shard]
        return self._source.contents.fetch(shard, self._source.rows(shard, place - first))
