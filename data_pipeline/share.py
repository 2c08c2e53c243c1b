"""What one rank reads and decodes of the global batches, from any position on."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data_pipeline.augment import Augment, Size, Views, draw_views
from data_pipeline.decode.decoder import Decoder
from data_pipeline.decode.images import Picture
from data_pipeline.faults import Bad, BadSample, Found, Rows
from data_pipeline.mixture import Located
from data_pipeline.stream import Stream
from flows.batch import Batch
from flows.errors import UserError

# Batches whose bytes are on their way while this one is decoded. Remote neighbours come in one request.
LOOKAHEAD = 4


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


class Share:
    """This rank's share of any global batch: no state but the open files.

    Of the batch of `batch` samples from position p it reads p + `share_of`(batch, rank, ranks). Images
    have (height, width) `size`, or that of the stream's bucket.

    Raises UserError where a rank would have no sample.
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
        self.ranks = ranks
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
        return self.decoder.open(*rows.files(chosen))

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
