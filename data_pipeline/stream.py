"""The endless stream of samples: position -> key, encoded image and label, on any rank alike."""

import hashlib

import numpy as np
from torch import Tensor

from data_pipeline.order import Order
from data_pipeline.samples import Encoded, Samples


class Stream:
    """Samples in their global order.

    samples: how many there are in an epoch
    fingerprint: names what the order depends on; equal fingerprints mean equal orders
    """

    def __init__(self, contents: Samples, *, seed: int, lanes: int, window: int) -> None:
        self.contents = contents
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

    def close(self) -> None:
        self.contents.close()


def open_stream(pattern: str, *, classes: int, seed: int, lanes: int, window: int) -> Stream:
    """The stream over the shards that `pattern` names.

    Raises UserError if a shard is missing, unsafe, or holds a sample without image or label.
    """
    return Stream(Samples(pattern, classes=classes), seed=seed, lanes=lanes, window=window)
