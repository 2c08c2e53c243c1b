"""The endless stream of samples: position -> key, encoded image and label, on any rank alike."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from data_pipeline.keep import Keep, Kept, open_kept
from data_pipeline.mixture import Located, MixedOrder
from data_pipeline.order import Int64
from data_pipeline.samples import Encoded, Samples


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


def open_set(pattern: str, weight: float, *, keep: Keep, classes: int | None) -> DataSet:
    """The samples of some shards that pass the filter; see `open_stream`."""
    contents = Samples(pattern, classes=classes)
    kept = open_kept(contents.urls, keep, pattern) if keep else None
    return DataSet(contents, kept, weight)


class Stream:
    """Samples in their global order.

    sets: the data sets it is drawn from
    epochs: samples in an epoch of each
    samples: in an epoch of all together
    fingerprint: names what the order depends on; equal fingerprints mean equal orders
    """

    def __init__(self, sets: Sequence[DataSet], *, seed: int, lanes: int, window: int) -> None:
        self.sets = tuple(sets)
        sizes, weights = [one.sizes for one in sets], [one.weight for one in sets]
        self.order = MixedOrder(sizes, weights, seed=seed, lanes=lanes, window=window)
        self.epochs = [order.samples for order in self.order.orders]
        self.samples = sum(self.epochs)
        facts = [
            (
                list(zip(one.contents.names, one.contents.sizes, strict=True)),
                one.kept and one.kept.fingerprint,
            )
            for one in sets
        ]
        proportions = self.order.mixture.weights.tolist()
        text = repr((facts, proportions, seed, lanes, window)).encode()
        self.fingerprint = hashlib.sha256(text).hexdigest()[:16]

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
        """The samples at (batch,) positions."""
        found = self.locate(positions)
        if len(self.sets) == 1:
            return self.sets[0].contents.read(found.shard, found.sample)
        count = len(positions)
        names, images, labels = [""] * count, [b""] * count, np.empty(count, np.int64)
        for number, one in enumerate(self.sets):
            mine = np.flatnonzero(found.source == number)
            part = one.contents.read(found.shard[mine], found.sample[mine])
            labels[mine] = part.labels
            for turn, place in enumerate(mine.tolist()):
                names[place], images[place] = part.names[turn], part.images[turn]
        return Encoded(names, images, labels)

    def locate(self, positions: Tensor) -> Located:
        """Set, epoch, shard and row in the shard of the samples at (batch,) positions."""
        found = self.order.sample_at(positions.numpy().astype(np.int64))
        sample = np.empty_like(found.sample)
        for number, one in enumerate(self.sets):
            mine = found.source == number
            sample[mine] = one.rows(found.shard[mine], found.sample[mine])
        return Located(found.source, found.epoch, found.shard, sample)

    def state_at(self, position: int) -> dict[str, Any]:
        """All that says where the stream stands: integers a data set, and what they count."""
        return {
            "position": position,
            "taken": self.order.mixture.taken(position),
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
) -> Stream:
    """The stream over shards, by pattern and weight.

    keep: see `open_kept`; empty: every sample

    Raises UserError if a shard is missing, unsafe, or holds a sample without image or label, if
    weights are too fine, or if nothing of a data set is kept.
    """
    sets = [open_set(pattern, weight, keep=keep, classes=classes) for pattern, weight in sources]
    return Stream(sets, seed=seed, lanes=lanes, window=window)
