"""The endless stream of samples: position -> key, encoded image and label, on any rank alike."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.augment import Size
from data_pipeline.buckets import BucketedOrder, Buckets, assign, read_sizes
from data_pipeline.faults import BadSample, Found, PastShard, Tolerance
from data_pipeline.keep import Keep, Kept, open_kept
from data_pipeline.mixture import Located, MixedOrder
from data_pipeline.order import Int64
from data_pipeline.samples import Encoded, Samples, whole
from data_pipeline.texts import TextMember
from flows.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """Samples that are passed over as one: each is read once an epoch of this set.

    kept: which of them a filter leaves; None: all
    weight: how often this set is drawn, in proportion to the others
    """

    contents: Samples
    kept: Kept | None
    weight: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples in each shard."""
        return self.contents.sizes if self.kept is None else self.kept.sizes

    def rows(self, shard: Int64, number: Int64) -> Int64:
        """Where the `number`-th samples of shards lie in them."""
        return number if self.kept is None else self.kept.rows(shard, number)


def open_set(
    pattern: str,
    weight: float,
    *,
    keep: Keep,
    classes: int | None,
    tolerate: Tolerance,
    text: TextMember | None = None,
) -> DataSet:
    """The samples of some shards that pass the filter; see `open_stream`."""
    contents = Samples(pattern, classes=classes, tolerate=tolerate, text=text)
    kept = open_kept(contents, keep, pattern) if keep else None
    return DataSet(contents, kept, weight)


class Stream:
    """Samples in their global order.

    sets: the data sets it is drawn from
    epochs: samples in an epoch of each
    samples: in an epoch of all together
    tolerate: which faults of theirs to live with
    text: the embedded captions that samples come with; None: without
    remote: some shards are not files of this machine, and are better asked for beforehand
    fingerprint: names what the order depends on; equal fingerprints mean equal orders
    """

    def __init__(
        self,
        sets: Sequence[DataSet],
        tolerate: Tolerance,
        *,
        seed: int,
        lanes: int,
        window: int,
        text: TextMember | None,
        buckets: Buckets | None,
    ) -> None:
        self.sets = tuple(sets)
        self.tolerate = tolerate
        self.text = text
        self.order = _order_of(self.sets, buckets, seed=seed, lanes=lanes, window=window)
        self.epochs = self.order.epochs
        self.samples = sum(self.epochs)
        self.remote = any(one.contents.remote for one in sets)
        facts = [
            (
                list(zip(one.contents.names, one.contents.sizes, strict=True)),
                one.kept and one.kept.fingerprint,
            )
            for one in sets
        ]
        named = [facts, list(self.order.proportions), seed, lanes, window]
        if buckets is not None:
            named += [buckets.shapes, buckets.batch]
        self.fingerprint = hashlib.sha256(repr(tuple(named)).encode()).hexdigest()[:16]

    def keys(self, positions: Tensor) -> list[str]:
        """`SHARD/KEY` of the samples at (batch,) positions; of several sets, `SET:SHARD/KEY`."""
        found = self.locate(positions)
        keys = [""] * len(positions)
        for number, one in enumerate(self.sets):
            mine = np.flatnonzero(found.source == number)
            named = one.contents.keys(found.shard[mine], found.sample[mine])
            for place, key in zip(mine.tolist(), named, strict=True):
                keys[place] = key if len(self.sets) == 1 else f"{number}:{key}"
        return keys

    def read(self, positions: Tensor) -> Encoded:
        """The samples at (batch,) positions; raises UserError for the first that is bad."""
        return whole(self.fetch(positions, torch.zeros_like(positions)))

    def fetch(self, positions: Tensor, attempts: Tensor) -> list[Found | BadSample]:
        """The samples at (batch,) positions; in the place of a bad one, what is wrong with it.

        attempts: (batch,) 0 for the sample itself, 1, 2, ... for those that take its place: any of the
            same epoch of the same data set, drawn by seed, position and attempt alone
        """
        return self.fetch_at(self.locate(positions, attempts))

    def fetch_at(self, located: Located) -> list[Found | BadSample]:
        """The samples at (batch,) places; in the place of a bad one, what is wrong with it."""
        found: list[Found | BadSample | None] = [None] * len(located.source)
        for one, mine in self._by_set(located):
            part = one.contents.fetch(located.shard[mine], located.sample[mine])
            for place, sample in zip(mine.tolist(), part, strict=True):
                found[place] = sample
        return [sample for sample in found if sample is not None]

    def expect(self, located: Located) -> None:
        """Name (batch,) places that will be asked for soon."""
        for one, mine in self._by_set(located):
            one.contents.expect(located.shard[mine], located.sample[mine])

    def forget(self) -> None:
        """What was expected will not be asked for."""
        for one in self.sets:
            one.contents.forget()

    def locate(self, positions: Tensor, attempts: Tensor | None = None) -> Located:
        """Set, epoch, shard and row in the shard of the samples at (batch,) positions.

        attempts: see `fetch`; None: the samples themselves
        """
        found = self.order.sample_at(
            positions.numpy().astype(np.int64), None if attempts is None else attempts.numpy()
        )
        sample = np.empty_like(found.sample)
        for one, mine in self._by_set(found):
            sample[mine] = one.rows(found.shard[mine], found.sample[mine])
        return Located(found.source, found.epoch, found.shard, sample)

    def _by_set(self, found: Located) -> Iterator[tuple[DataSet, Int64]]:
        """Each data set that some of (batch,) samples are of, and which of them."""
        for number, one in enumerate(self.sets):
            if (mine := np.flatnonzero(found.source == number)).size:
                yield one, mine

    def size_at(self, position: int) -> Size | None:
        """(height, width) of the global batch that holds a position; None: any that is wanted."""
        return self.order.size_at(position)

    @property
    def past(self) -> list[PastShard]:
        """The shards of all sets, as a run that begins now has to remember them."""
        return [
            shard._replace(source=number)
            for number, one in enumerate(self.sets)
            for shard in one.contents.past
        ]

    @property
    def urls(self) -> tuple[str, ...]:
        """The shards of all sets."""
        return tuple(url for one in self.sets for url in one.contents.urls)

    def state_at(self, position: int) -> dict[str, Any]:
        """All that says where the stream stands: integers a data set, and what they count."""
        return {
            "position": position,
            "taken": self.order.taken(position),
            "samples": self.epochs,
            "fingerprint": self.fingerprint,
        }

    def close(self) -> None:
        for one in self.sets:
            one.contents.close()


def open_stream(
    sources: Sequence[tuple[str, float]],
    *,
    keep: Keep,
    classes: int,
    seed: int,
    lanes: int,
    window: int,
    tolerate: Tolerance | None = None,
    text: TextMember | None = None,
    buckets: Buckets | None = None,
) -> Stream:
    """The stream over shards, by pattern and weight.

    keep: see `open_kept`; empty: every sample
    tolerate: which faults to live with; None: none
    text: the embedded captions that every sample has; None: they are not read
    buckets: shapes of batches, each of which holds images of about its aspect alone, so that little of
        them is cut off; None: all batches have one shape

    Raises UserError if a shard is missing, unsafe, or holds a sample without image, label or text, if
    weights are too fine, or if nothing of a data set is kept.
    """
    tolerate = tolerate or Tolerance(0.0, None, None)
    sets = [
        open_set(
            pattern, weight, keep=keep, classes=classes, tolerate=tolerate.of_set(number), text=text
        )
        for number, (pattern, weight) in enumerate(sources)
    ]
    return Stream(sets, tolerate, seed=seed, lanes=lanes, window=window, text=text, buckets=buckets)


def _order_of(
    sets: Sequence[DataSet], buckets: Buckets | None, *, seed: int, lanes: int, window: int
) -> MixedOrder | BucketedOrder:
    if buckets is None:
        sizes, weights = [one.sizes for one in sets], [one.weight for one in sets]
        return MixedOrder(sizes, weights, seed=seed, lanes=lanes, window=window)
    if len(sets) > 1:
        raise UserError(
            "data.train: a mixture of data sets has no buckets of shapes; train on one set, or on images "
            "of one shape"
        )
    (one,) = sets
    assigned = []
    for shard, count in enumerate(one.sizes):
        number = np.arange(count)
        rows = one.rows(np.full_like(number, shard), number)
        assigned.append(assign(read_sizes(one.contents, shard)[rows], buckets.shapes))
    return BucketedOrder(
        assigned, buckets.shapes, batch=buckets.batch, seed=seed, lanes=lanes, window=window
    )
