"""The order of the endless stream of samples: position -> (epoch, shard, sample), a pure function.

An epoch is one pass over all `N` samples. For each epoch the shards are put in a new order and read
as one list of N samples. That list is cut, at sample level, into `lanes` contiguous runs whose
lengths differ by at most one; positions are dealt to the lanes in turn, and each lane shuffles its
samples inside windows of `window`. So memory is O(shards), any position is found in the same time,
and nothing depends on the number of ranks: a rank asks for the positions it wants.

All shuffling is one function, `permute`: the swap-or-not cipher (Hoang, Morris and Rogaway 2012,
"An enciphering scheme based on a card shuffle"), which permutes 0 .. count - 1 for any count
without a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

# After r rounds the place of one sample is uniform to within 2^-r.
ROUNDS = 24
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUND_KEYS = GOLDEN * np.arange(1, ROUNDS + 1, dtype=np.uint64)
# One epoch's shard order is 16 bytes a shard; a batch touches two epochs, more if data is tiny.
KEPT_EPOCHS = 4
SHARDS, WINDOWS = 1, 2


@dataclass(frozen=True)
class Located:
    """Where some positions of the stream lie; three (positions,) int64 arrays.

    epoch: passes over the data before this one
    shard: which shard, counted in the given order
    sample: which sample of that shard
    """

    epoch: Int64
    shard: Int64
    sample: Int64


class Order:
    """The stream of samples of shards of the given sizes.

    sizes: samples in each shard
    lanes: independent readers; more than there are samples counts as one each
    window: samples shuffled together within a lane; 1 leaves a lane as its shards lie
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, lanes: int, window: int) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.samples = int(self.sizes.sum())
        if self.samples < 1:
            raise ValueError("an order needs at least one sample")
        self.seed = seed
        self.lanes = min(lanes, self.samples)
        self.window = window
        self._layout = lru_cache(KEPT_EPOCHS)(self._lay_out)

    def sample_at(self, positions: Int64) -> Located:
        """Where (positions,) places of the endless stream lie; each is found without any other."""
        epoch, within = np.divmod(np.asarray(positions, np.int64), self.samples)
        place = self._place(epoch, within)
        shard, sample = np.empty_like(place), np.empty_like(place)
        for number in np.unique(epoch):
            shards, ends = self._layout(int(number))
            mine = epoch == number
            turn = np.searchsorted(ends, place[mine], side="right")
            shard[mine] = shards[turn]
            sample[mine] = place[mine] - (ends[turn] - self.sizes[shards[turn]])
        return Located(epoch, shard, sample)

    def _place(self, epoch: Int64, within: Int64) -> Int64:
        """Place in the epoch's list of samples, of each position `within` that epoch."""
        # The first `longer` lanes hold one sample more, and they alone are dealt the last row.
        shorter_length, longer = divmod(self.samples, self.lanes)
        row, lane = np.divmod(within, self.lanes)
        start = lane * shorter_length + np.minimum(lane, longer)
        length = shorter_length + (lane < longer)
        window, turn = np.divmod(row, self.window)
        first = window * self.window
        count = np.minimum(length - first, self.window)
        key = fold(self.seed, WINDOWS, epoch, lane, window)
        return np.asarray(start + first + permute(turn, count, key), np.int64)

    def _lay_out(self, epoch: int) -> tuple[Int64, Int64]:
        """Shards in the order of this epoch, and where each ends in the epoch's list of samples."""
        every = np.arange(len(self.sizes))
        shards = permute(every, np.full_like(every, len(every)), fold(self.seed, SHARDS, epoch))
        return shards, np.cumsum(self.sizes[shards])


def permute(index: Int64, count: Int64, key: UInt64) -> Int64:
    """Where the permutation of 0 .. count - 1 named by `key` takes `index`; arrays, elementwise."""
    size = count.astype(np.uint64)
    place = index.astype(np.uint64)
    for word in mix(np.add.outer(ROUND_KEYS, key)):
        pivot = word % size
        # In every round each place has one partner; a coin of the pair decides if they swap.
        partner = np.where(place <= pivot, pivot - place, pivot + size - place)
        coin = mix(word + np.maximum(place, partner)) >> np.uint64(63)
        place = np.where(coin == 1, partner, place)
    return place.astype(np.int64)


def fold(*words: int | Int64) -> UInt64:
    """One 64-bit key out of several integers or arrays of them (broadcast together)."""
    key = np.zeros(1, np.uint64)
    for word in words:
        key = mix((key ^ np.asarray(word).astype(np.uint64)) + GOLDEN)
    return key


def mix(word: UInt64) -> UInt64:
    """Every bit of the result depends on every bit of `word` (the finaliser of SplitMix64)."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
