"""The order of the endless stream of samples: position -> (epoch, shard, sample), a pure function.

An epoch is one pass over all `N` samples. For each epoch the shards are put in a new order and read
as one list of N samples. That list is cut, at sample level, into `lanes` contiguous runs whose
lengths differ by at most one, one run for each lane in an order that is new too, so that a batch
smaller than the lanes draws from all over the list. Positions are dealt to the lanes in turn, and
each lane shuffles its samples inside windows of `window`. So memory is O(shards), any position is
found in the same time, and nothing depends on the number of ranks: a rank asks for the positions
it wants.

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
SHARDS, WINDOWS, LANES = 1, 2, 3
# The draws that choose a sample in the place of a bad one, apart from those of the order.
SUBSTITUTES = 0x5B57


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


@dataclass(frozen=True)
class Layout:
    """What is drawn once an epoch.

    shards: (shards,) their order
    ends: (shards,) where each ends in the epoch's list of samples
    starts: (lanes,) where each lane's run begins in that list
    """

    shards: Int64
    ends: Int64
    starts: Int64


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
        # The first lanes hold one sample more, and they alone are dealt the last row.
        shorter, longer = divmod(self.samples, self.lanes)
        self._lengths = shorter + (np.arange(self.lanes) < longer)
        self._layout = lru_cache(KEPT_EPOCHS)(self._lay_out)

    def sample_at(self, positions: Int64) -> Located:
        """Where (positions,) places of the endless stream lie; each is found without any other."""
        epoch, within = np.divmod(np.asarray(positions, np.int64), self.samples)
        row, lane = np.divmod(within, self.lanes)
        place = self._place_in_run(epoch, row, lane)
        shard, sample = np.empty_like(place), np.empty_like(place)
        for number in np.unique(epoch):
            layout = self._layout(int(number))
            mine = epoch == number
            listed = layout.starts[lane[mine]] + place[mine]
            turn = np.searchsorted(layout.ends, listed, side="right")
            shard[mine] = layout.shards[turn]
            sample[mine] = listed - (layout.ends[turn] - self.sizes[layout.shards[turn]])
        return Located(epoch, shard, sample)

    def others(self, positions: Int64, attempts: Int64) -> Int64:
        """(positions,) places whose samples take the place of these at (positions,) attempts.

        Attempt 0: the places themselves; any later one: any of the same epoch, drawn by seed, place
        and attempt alone.
        """
        draw = fold(self.seed, SUBSTITUTES, positions, attempts) % np.uint64(self.samples)
        other = positions - positions % self.samples + draw.astype(np.int64)
        return np.where(attempts > 0, other, positions)

    def _place_in_run(self, epoch: Int64, row: Int64, lane: Int64) -> Int64:
        """Which sample of its run a lane reads as number `row`."""
        window, turn = np.divmod(row, self.window)
        first = window * self.window
        count = np.minimum(self._lengths[lane] - first, self.window)
        key = fold(self.seed, WINDOWS, epoch, lane, window)
        return first + permute(turn, count, key)

    def _lay_out(self, epoch: int) -> Layout:
        shards = shuffled(len(self.sizes), fold(self.seed, SHARDS, epoch))
        order = shuffled(self.lanes, fold(self.seed, LANES, epoch))
        starts = np.empty_like(order)
        starts[order] = np.cumsum(self._lengths[order]) - self._lengths[order]
        return Layout(shards, np.cumsum(self.sizes[shards]), starts)


def shuffled(count: int, key: UInt64) -> Int64:
    """0 .. count - 1 in the order named by `key`."""
    every = np.arange(count)
    return permute(every, np.full_like(every, count), key)


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
