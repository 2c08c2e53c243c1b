"""Samples in the order of their files, without epochs and ranks, for all that is not training."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data_pipeline.augment import Size
from data_pipeline.decode.decoder import Decoder, decode_middle
from data_pipeline.faults import BadSample, Found, Rows, Tolerance
from data_pipeline.keep import Keep
from data_pipeline.stream import DataSet, open_set
from data_pipeline.texts import TextMember


def read_all(
    patterns: Sequence[str],
    decoder: Decoder,
    *,
    size: Size,
    keep: Keep,
    classes: int,
    limit: int | None,
    batch: int,
    tolerate: Tolerance | None = None,
) -> tuple[Tensor, Tensor]:
    """The first `limit` samples in file order, for evaluation.

    keep: see `open_stream`
    batch: images decoded at a time
    tolerate: where it allows bad samples, the next good one is taken once more; None: none

    Returns images (samples, channels, *size) in [-1, 1] and labels (samples,) on CPU
    """
    tolerate = tolerate or Tolerance(0.0, None, None)
    images, labels = [], []
    left = math.inf if limit is None else limit
    for number, pattern in enumerate(patterns):
        tolerated = tolerate.of_set(number)
        source = open_set(pattern, 1.0, keep=keep, classes=classes, tolerate=tolerated)
        count = int(min(left, sum(source.sizes)))
        for start in range(0, count, batch):
            positions = torch.arange(start, min(start + batch, count))
            rows = Rows(InFileOrder(source), positions, tolerant=not tolerate.strict)
            images.append(rows.apply(partial(_decode_middle, decoder, rows, size)))
            labels.append(torch.tensor([one.label for one in rows.samples]))
        source.contents.close()
        left -= count
    return torch.cat(images), torch.cat(labels)


def texts_in_file_order(
    pattern: str, places: Tensor, text: TextMember, *, classes: int, tolerate: Tolerance
) -> tuple[Tensor, Tensor]:
    """Labels (n,) and embedded captions (n, tokens, width) of the samples at (n,) places of some shards.

    places: in the order of the shards; beyond their end they begin again
    """
    source = open_set(pattern, 1.0, keep={}, classes=classes, tolerate=tolerate, text=text)
    try:
        rows = Rows(InFileOrder(source), places, tolerant=not tolerate.strict)
        samples = rows.samples
        labels = torch.tensor([one.label for one in samples])
        return labels, text.stack([one.words for one in samples if one.words is not None])
    finally:
        source.contents.close()


def _decode_middle(decoder: Decoder, rows: Rows, size: Size, chosen: Sequence[int]) -> Tensor:
    return decode_middle(decoder, *rows.files(chosen), size).cpu()


class InFileOrder:
    """Samples by their place in the shards, one after another."""

    def __init__(self, source: DataSet) -> None:
        self._source = source
        self._ends = np.cumsum(source.sizes)

    def fetch(self, positions: Tensor, attempts: Tensor) -> list[Found | BadSample]:
        """In the place of a bad one comes the next."""
        place = (positions + attempts).numpy() % self._ends[-1]
        shard = np.searchsorted(self._ends, place, side="right")
        first = self._ends[shard] - np.asarray(self._source.sizes)[shard]
        return self._source.contents.fetch(shard, self._source.rows(shard, place - first))
