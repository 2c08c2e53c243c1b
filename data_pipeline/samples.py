"""The samples of a few shards by (shard, sample): their keys, encoded images and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import IMAGES, ShardIndex, open_index
from data_pipeline.reader import Range, RangeReader
from data_pipeline.shards import expand, short_names
from flows.errors import UserError

Int64 = NDArray[np.int64]

LABEL = "cls"
# An index is some 50 bytes a sample; a lane stays in one shard for long, so few are in use.
KEPT_INDEXES = 512


@dataclass(frozen=True)
class Encoded:
    """A few samples as they lie in the shards.

    names: "URL: sample KEY" of each, for messages
    images: the bytes of each image file
    labels: (batch,) int64
    """

    names: list[str]
    images: list[bytes]
    labels: Int64


class Samples:
    """Every sample of the shards that a pattern names.

    urls, names, sizes: address, short name and number of samples of each shard
    classes: labels are below this; None: any label that is not negative

    Raises UserError if a shard is missing or unsafe, or a sample lacks its image or label.
    """

    def __init__(self, pattern: str, *, classes: int | None) -> None:
        self.urls = expand(pattern)
        self.names = short_names(self.urls)
        self.classes = classes
        self._index = lru_cache(KEPT_INDEXES)(open_checked)
        self.sizes = tuple(len(self._index(url)) for url in self.urls)
        self._reader = RangeReader()
        if sum(self.sizes) == 0:
            raise UserError(f"{pattern}: the shards hold no samples; pack some images into them")

    def __len__(self) -> int:
        return sum(self.sizes)

    def keys(self, shard: Int64, sample: Int64) -> list[str]:
        """`SHARD/KEY` of each sample, the same wherever the data set lies."""
        return [
            f"{self.names[s]}/{self._index(self.urls[s]).keys[n]}"
            for s, n in zip(shard.tolist(), sample.tolist(), strict=True)
        ]

    def read(self, shard: Int64, sample: Int64) -> Encoded:
        """(batch,) samples, in the order asked for.

        Raises UserError for a label that is no integer or not below `classes`.
        """
        names: list[str] = []
        ranges: list[Range] = []
        for s, n in zip(shard.tolist(), sample.tolist(), strict=True):
            index = self._index(self.urls[s])
            names.append(f"{index.url}: sample {index.keys[n]}")
            ranges += [member_range(index, n, IMAGES), member_range(index, n, (LABEL,))]
        contents = self._reader.read(ranges)
        labels = [
            parse_label(text, name, self.classes)
            for text, name in zip(contents[1::2], names, strict=True)
        ]
        return Encoded(names, contents[::2], np.array(labels, np.int64))

    def close(self) -> None:
        self._reader.close()


def open_checked(url: str) -> ShardIndex:
    """The index of a shard, every sample of which has one image and a label."""
    index = open_index(url)
    for what, extensions in (("image", IMAGES), ("label", (LABEL,))):
        columns = [c for e in extensions if (c := index.column(e)) is not None]
        count = (index.offsets[:, columns] >= 0).sum(axis=1)
        if (wrong := np.flatnonzero(count != 1)).size:
            key, number = index.keys[wrong[0]], int(count[wrong[0]])
            named = " or ".join(f".{extension}" for extension in extensions)
            raise UserError(
                f"{url}: sample {key} has {number or 'no'} {what} members ({named}) and needs "
                "exactly one; pack the shard again"
            )
    return index


def member_range(index: ShardIndex, sample: int, extensions: Sequence[str]) -> Range:
    """Where the sample's one member with one of these extensions lies."""
    for extension in extensions:
        column = index.column(extension)
        if column is not None and index.offsets[sample, column] >= 0:
            offset, size = index.offsets[sample, column], index.sizes[sample, column]
            return Range(index.url, int(offset), int(size))
    raise KeyError(f"{index.url}: sample {index.keys[sample]} has none of {extensions}")


def parse_label(text: bytes, name: str, classes: int | None) -> int:
    """The class in a `.cls` member; raises UserError naming the sample."""
    try:
        label = int(text.decode("ascii"))
    except ValueError as error:
        raise UserError(
            f"{name}: label {text[:40]!r} is not an integer; write its class"
        ) from error
    if label < 0 or (classes is not None and label >= classes):
        allowed = "not be negative" if classes is None else f"lie in 0 .. {classes - 1}"
        raise UserError(f"{name}: label {label} must {allowed}; raise data.classes or relabel it")
    return label
