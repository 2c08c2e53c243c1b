"""Batches of one shape each: images go to buckets of (height, width) of about equal area, by aspect.

The samples of a bucket are an endless stream of their own (an `Order`, with epochs of its own), and
global batches are dealt to buckets in proportion to their samples: of n_k among N, batch j of
bucket k is due at time (2 j + 1) / (2 n_k), and batches follow each other by time. That takes no
table and no state, so which samples a position holds, and at what shape, stays a function of seed
and position alone.

Among the first b batches bucket k has b n_k / N of them, to within (1 + K n_k / N) / 2 for K
buckets; and its own samples come once each in every run of n_k of them. So after E epochs' worth of
batches each sample was seen E times, give or take that many batches of its bucket.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_pipeline.augment import Size
from data_pipeline.decode.images import read_picture
from data_pipeline.faults import BadSample, Found
from data_pipeline.mixture import Located
from data_pipeline.order import Int64, Order
from data_pipeline.remembered import remembered
from data_pipeline.samples import Samples
from flows.errors import UserError

KEPT_BATCHES = 16
READ_AT_ONCE = 256


def make_buckets(side: int, *, multiple: int, widest: float) -> tuple[Size, ...]:
    """Shapes of about side^2 pixels with sides divisible by `multiple`, tall to wide.

    widest: the largest width over height, and height over width, of any
    Areas differ from side^2 by less than `multiple` pixels times half the longer side.
    """
    wide: set[Size] = set()
    for width in range(side, int(side * widest) + 1, multiple):
        height = max(round(side * side / width / multiple), 1) * multiple
        if height <= width <= widest * height:
            wide.add((height, width))
    return tuple(sorted(wide | {(width, height) for height, width in wide}, key=_aspect))


@dataclass(frozen=True)
class Buckets:
    """Shapes that batches may have.

    shapes: (height, width), tall to wide, as `make_buckets` makes them
    batch: samples a step over all ranks
    """

    shapes: tuple[Size, ...]
    batch: int


def read_sizes(contents: Samples, shard: int) -> Int64:
    """(samples, 2) height and width, upright, of the images of a shard, by their headers.

    Every image is read for it, once: the answer is remembered. Where bad samples are tolerated, one
    that cannot be read counts as square, to be replaced and reported in its turn like any other.

    Raises BadImages, BadSample for those that are damaged or of a kind not read.
    """
    tolerant = contents.tolerate is not None and not contents.tolerate.strict

    def make() -> Int64:
        sizes: list[Size] = []
        for start in range(0, contents.sizes[shard], READ_AT_ONCE):
            rows = np.arange(start, min(start + READ_AT_ONCE, contents.sizes[shard]))
            for found in contents.fetch(np.full_like(rows, shard), rows):
                sizes.append(_size_of(found, tolerant))
        return np.array(sizes, np.int64).reshape(-1, 2)

    return remembered(contents.urls[shard], f"sizes {tolerant}", make)


def _size_of(found: Found | BadSample, tolerant: bool) -> Size:
    try:
        if isinstance(found, BadSample):
            raise found
        return read_picture(found.image, found.name).size
    except UserError:
        if not tolerant:
            raise
        return (1, 1)


def assign(sizes: NDArray[np.integer], buckets: Sequence[Size]) -> NDArray[np.uint8]:
    """(samples,) the bucket of the nearest aspect, by ratio, of images of (samples, 2) height, width.

    buckets: tall to wide; of two as near, an image goes to the wider one

    The limit between neighbours is the geometric mean of their aspects, and images are compared
    with it as whole numbers, so that no machine puts one elsewhere.
    """
    height, width = np.asarray(sizes, np.int64).T
    assigned = np.zeros(len(sizes), np.uint8)
    for taller, wider in pairwise(buckets):
        assigned += width**2 * (taller[0] * wider[0]) >= height**2 * (taller[1] * wider[1])
    return assigned


class BucketedOrder:
    """The endless stream of samples, a bucket at a time; `sample_at` as `Order` has it.

    buckets: (height, width) of each that has samples
    batch: samples a step over all ranks; the order depends on it
    epochs, proportions, taken, size_at: as `MixedOrder` has them
    """

    proportions = (1,)

    def __init__(
        self,
        assigned: Sequence[NDArray[np.uint8]],
        buckets: Sequence[Size],
        *,
        batch: int,
        seed: int,
        lanes: int,
        window: int,
    ) -> None:
        """assigned: for each shard, (samples,) the bucket of each; see `assign`"""
        self.batch = batch
        self.samples = sum(len(shard) for shard in assigned)
        used = [b for b in range(len(buckets)) if any((shard == b).any() for shard in assigned)]
        self.buckets = tuple(buckets[b] for b in used)
        self._rows = [[np.flatnonzero(shard == b) for shard in assigned] for b in used]
        sizes = [[len(rows) for rows in shards] for shards in self._rows]
        # Seeds differ, so that buckets of one shape do not run in step.
        self._orders = [
            Order(shards, seed=seed + b, lanes=lanes, window=window)
            for b, shards in zip(used, sizes, strict=True)
        ]
        counts = [order.samples for order in self._orders]
        self._deal = lru_cache(KEPT_BATCHES)(partial(deal, counts=counts))
        self.epochs = [self.samples]

    def taken(self, position: int) -> list[int]:
        return [position]

    def size_at(self, position: int) -> Size:
        """(height, width) of the global batch that holds a position."""
        return self.buckets[self._deal(position // self.batch)[0]]

    def sample_at(self, positions: Int64, attempts: Int64 | None = None) -> Located:
        """Where (positions,) places of the endless stream lie; an epoch is one of its bucket.

        attempts: see `Order.others`; the others are of the same bucket
        """
        positions = np.asarray(positions, np.int64)
        epoch, shard, sample = np.empty((3, len(positions)), np.int64)
        number, row = np.divmod(positions, self.batch)
        for one in np.unique(number):
            mine = number == one
            bucket, turn = self._deal(int(one))
            order, place = self._orders[bucket], turn * self.batch + row[mine]
            found = order.sample_at(
                place if attempts is None else order.others(place, attempts[mine])
            )
            epoch[mine], shard[mine] = found.epoch, found.shard
            rows = self._rows[bucket]
            pairs = zip(found.shard.tolist(), found.sample.tolist(), strict=True)
            sample[mine] = [rows[s][n] for s, n in pairs]
        return Located(np.zeros_like(epoch), epoch, shard, sample)


def deal(number: int, counts: Sequence[int]) -> tuple[int, int]:
    """Which bucket the batch of this number belongs to, and how many it had before.

    counts: samples of each bucket
    """
    total = sum(counts)
    for bucket, count in enumerate(counts):
        # No bucket is ever this many batches away from its share.
        near = number * count // total
        turns = range(max(near - len(counts), 0), near + len(counts) + 2)
        before = partial(_before, bucket, counts=counts)
        turn = turns.start + bisect.bisect_left(turns, number, key=before)
        if before(turn) == number:
            return bucket, turn
    raise AssertionError(f"no bucket has batch {number} of {list(counts)}")


def _before(bucket: int, turn: int, *, counts: Sequence[int]) -> int:
    """Batches before batch `turn` of `bucket`: those due earlier, or at its time in a bucket before."""
    count = counts[bucket]
    earlier = 0
    for other, others in enumerate(counts):
        # Batch j is due earlier if (2 j + 1) count < (2 turn + 1) others.
        due = (2 * turn + 1) * others + (1 if other < bucket else 0)
        earlier += max(0, -((count - due) // (2 * count)))
    return earlier


def _aspect(size: Size) -> float:
    return size[1] / size[0]
