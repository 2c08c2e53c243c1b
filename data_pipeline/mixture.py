"""The order of several data sets mixed by weight: position -> (set, epoch, shard, sample), pure.

Weights w_1 .. w_k are whole numbers once their decimals are cleared, so the pattern of sets repeats
after P = w_1 + ... + w_k positions and is laid out once. The j-th sample of set d (j = 0, 1, ...)
may come from place floor(j P / w_d) on and has to come before place ceil((j + 1) P / w_d); taking
at every place, of those that may come, the one that has to come first always meets every such
deadline (Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate progress: a notion of fairness in
resource allocation", for one processor). So over any n positions from the start set d is drawn
n w_d / P times, rounded up or down. Each set goes through epochs of its own.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from data_pipeline.augment import Size
from data_pipeline.order import Int64, Order
from flows.errors import UserError

# The pattern costs 12 bytes a place: five digits of weight are exact and stay below a megabyte.
LONGEST_PATTERN = 100_000


@dataclass(frozen=True)
class Drawn:
    """Which data set each position draws from; two (positions,) int64 arrays.

    source: the data set, counted in the given order
    turn: samples drawn from that set before, which is the place in its own endless stream
    """

    source: Int64
    turn: Int64


class Mixture:
    """Data sets drawn in proportion to `weights`.

    Raises UserError for weights with so many digits that the pattern would be long.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = np.array(whole_proportions(weights), np.int64)
        self.period = int(self.weights.sum())
        self._source = lay_pattern(self.weights.tolist())
        self._turn = np.empty(self.period, np.int64)
        for source in range(len(self.weights)):
            places = np.flatnonzero(self._source == source)
            self._turn[places] = np.arange(len(places))

    def draw(self, positions: Int64) -> Drawn:
        """The data set of each of (positions,) places of the endless stream."""
        cycle, place = np.divmod(np.asarray(positions, np.int64), self.period)
        source = self._source[place]
        return Drawn(source, cycle * self.weights[source] + self._turn[place])

    def taken(self, position: int) -> list[int]:
        """How many samples of each set come before `position`."""
        cycles, place = divmod(position, self.period)
        begun = np.bincount(self._source[:place], minlength=len(self.weights))
        return [int(count) for count in cycles * self.weights + begun]


@dataclass(frozen=True)
class Located:
    """Where some positions of a mixed stream lie; four (positions,) int64 arrays.

    source: the data set
    epoch: passes over that set before this one
    shard, sample: which shard of the set, and which sample of the shard
    """

    source: Int64
    epoch: Int64
    shard: Int64
    sample: Int64

    def split(self, size: int) -> list["Located"]:
        """Runs of `size` positions."""
        every = (self.source, self.epoch, self.shard, self.sample)
        return [
            Located(*(values[start : start + size] for values in every))
            for start in range(0, len(self.source), size)
        ]


class MixedOrder:
    """The endless stream over data sets whose shards have the given sizes.

    sizes: for each data set, the samples in each of its shards
    weights: how often each set is drawn, in proportion
    lanes, window: see `Order`; every set has its own
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        seed: int,
        lanes: int,
        window: int,
    ) -> None:
        self.mixture = Mixture(weights)
        # Seeds differ, so that sets of one shape do not run in step.
        self.orders = [
            Order(shards, seed=seed + number, lanes=lanes, window=window)
            for number, shards in enumerate(sizes)
        ]

    @property
    def epochs(self) -> list[int]:
        """Samples in an epoch of each set."""
        return [order.samples for order in self.orders]

    @property
    def proportions(self) -> list[int]:
        """The weights, as whole numbers."""
        return [int(weight) for weight in self.mixture.weights]

    def taken(self, position: int) -> list[int]:
        """How many samples of each set come before `position`."""
        return self.mixture.taken(position)

    def size_at(self, position: int) -> Size | None:
        """Images of any place become whatever size the loader wants."""
        del position
        return None

    def sample_at(self, positions: Int64, attempts: Int64 | None = None) -> Located:
        """Where (positions,) places lie; each is found without any other.

        attempts: see `Order.others`; the others are of the same data set
        """
        drawn = self.mixture.draw(positions)
        epoch, shard, sample = np.empty((3, len(drawn.source)), np.int64)
        for number in np.unique(drawn.source):
            mine = drawn.source == number
            order, turn = self.orders[number], drawn.turn[mine]
            found = order.sample_at(
                turn if attempts is None else order.others(turn, attempts[mine])
            )
            epoch[mine], shard[mine], sample[mine] = found.epoch, found.shard, found.sample
        return Located(drawn.source, epoch, shard, sample)


def whole_proportions(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportions that the weights' decimals spell."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    shared = math.gcd(*whole)
    if sum(whole) // shared > LONGEST_PATTERN:
        given = ", ".join(str(weight) for weight in weights)
        raise UserError(
            f"data.train: the weights {given} repeat only after {sum(whole) // shared:,} samples, and "
            f"{LONGEST_PATTERN:,} are allowed; round them to at most four digits"
        )
    return [weight // shared for weight in whole]


def lay_pattern(weights: Sequence[int]) -> Int64:
    """(sum of weights,) which set each place of one period draws from."""
    period = sum(weights)
    # (first place allowed, set, number drawn) of the next sample of each set, and, of those that
    # may come, (place it must come before, set, number drawn).
    waiting = [(0, source, 0) for source in range(len(weights))]
    due: list[tuple[int, int, int]] = []
    pattern = np.empty(period, np.int64)
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source, count = heapq.heappop(waiting)
            heapq.heappush(due, (-(-(count + 1) * period // weights[source]), source, count))
        _, source, count = heapq.heappop(due)
        pattern[place] = source
        if count + 1 < weights[source]:
            heapq.heappush(waiting, ((count + 1) * period // weights[source], source, count + 1))
    return pattern
