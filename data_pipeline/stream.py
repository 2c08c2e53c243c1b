"""The endless stream of samples: position -> key, encoded image and label, on any rank alike."""

import hashlib

import numpy as np
from torch import Tensor

from data_pipeline.faults import BadSample, Found, Tolerance
from data_pipeline.order import Order, fold
from data_pipeline.samples import Encoded, Samples

# The draws that choose a sample in the place of a bad one, apart from those of the order.
SUBSTITUTES = 0x5B57


class Stream:
    """Samples in their global order.

    samples: how many there are in an epoch
    tolerate: which faults of theirs to live with
    fingerprint: names what the order depends on; equal fingerprints mean equal orders
    """

    def __init__(self, contents: Samples, *, seed: int, lanes: int, window: int) -> None:
        self.contents = contents
        self.tolerate = contents.tolerate or Tolerance(0.0, None, None)
        self.order = Order(contents.sizes, seed=seed, lanes=lanes, window=window)
        self.samples = self.order.samples
        shards = list(zip(contents.names, contents.sizes, strict=True))
        facts = repr((shards, seed, lanes, window)).encode()
        self.fingerprint = hashlib.sha256(facts).hexdigest()[:16]

    def keys(self, positions: Tensor) -> list[str]:
        """`SHARD/KEY` of the samples at (batch,) positions."""
        found = self.order.sample_at(positions.numpy().astype(np.int64))
        return self.contents.keys(found.shard, found.sample)

    def read(self, positions: Tensor) -> Encoded:
        """The samples at (batch,) positions."""
        found = self.order.sample_at(positions.numpy().astype(np.int64))
        return self.contents.read(found.shard, found.sample)

    def fetch(self, positions: Tensor, attempts: Tensor) -> list[Found | BadSample]:
        """The samples at (batch,) positions; in the place of a bad one, what is wrong with it.

        attempts: (batch,) 0 for the sample itself, 1, 2, ... for those that take its place: any of the
            same epoch, drawn by seed, position and attempt alone
        """
        place, attempt = positions.numpy().astype(np.int64), attempts.numpy()
        draw = fold(self.order.seed, SUBSTITUTES, place, attempt) % np.uint64(self.samples)
        other = place - place % self.samples + draw.astype(np.int64)
        found = self.order.sample_at(np.where(attempt > 0, other, place))
        return self.contents.fetch(found.shard, found.sample)

    def expect(self, positions: Tensor) -> None:
        """Name (batch,) positions that will be asked for soon."""
        found = self.order.sample_at(positions.numpy().astype(np.int64))
        self.contents.expect(found.shard, found.sample)

    def forget(self) -> None:
        """What was expected will not be asked for."""
        self.contents.forget()

    def close(self) -> None:
        self.contents.close()


def open_stream(
    pattern: str,
    *,
    classes: int,
    seed: int,
    lanes: int,
    window: int,
    tolerate: Tolerance | None = None,
) -> Stream:
    """The stream over the shards that `pattern` names.

    tolerate: which faults to live with; None: none
    Raises UserError if a shard is missing, unsafe, or holds a sample without image or label.
    """
    contents = Samples(pattern, classes=classes, tolerate=tolerate)
    return Stream(contents, seed=seed, lanes=lanes, window=window)
