"""Filters: which samples of each shard a stream keeps, known before the first is drawn.

A filter is decided when the stream is opened, so that dropping samples makes shards smaller and
shifts nothing later. It reads the label or `.json` of every sample once; the answer is kept in the
user's cache folder beside the indexes, for as long as the shard has not changed.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from data_pipeline.headers import sample_name
from data_pipeline.index import ShardIndex, open_index
from data_pipeline.order import Int64
from data_pipeline.reader import Range, RangeReader
from data_pipeline.remembered import remembered
from data_pipeline.samples import LABEL, Samples, find_one, parse_label
from flows.errors import UserError

Value = bool | int | float | str | None
Keep = Mapping[str, Sequence[Value]]

RECORD = "json"
# Small members are asked for together, so that remote ones can share requests.
READ_AT_ONCE = 1024
# Rows are 8 bytes a sample; a lane stays in one shard for long, so few are in use.
KEPT_ROWS = 512


class Kept:
    """What a filter leaves of some shards.

    sizes: samples left in each
    fingerprint: names the filter and what it left
    """

    def __init__(self, contents: Samples, keep: Keep) -> None:
        self.urls = contents.urls
        tolerant = contents.tolerate is not None and not contents.tolerate.strict
        self._rows = lru_cache(KEPT_ROWS)(
            partial(kept_rows, keep=keep, tolerant=tolerant, index_of=contents.index)
        )
        digest = hashlib.sha256(describe(keep).encode())
        sizes = []
        for url in self.urls:
            rows = self._rows(url)
            digest.update(rows.tobytes())
            sizes.append(len(rows))
        self.sizes = tuple(sizes)
        self.fingerprint = digest.hexdigest()[:16]

    def rows(self, shard: Int64, number: Int64) -> Int64:
        """Where the `number`-th kept samples of shards lie in them; all (samples,)."""
        found = [
            self._rows(self.urls[s])[n]
            for s, n in zip(shard.tolist(), number.tolist(), strict=True)
        ]
        return np.array(found, np.int64)


def open_kept(contents: Samples, keep: Keep, pattern: str) -> Kept:
    """The samples whose every field has one of the values given for it.

    keep: field -> values. Field `cls` is the label; any other is one of the sample's `.json`, where
        a missing one counts as null. Where bad samples are tolerated, one without a label that can
        be read stays, to be replaced and reported in its turn like any other bad one.

    Raises UserError if a shard cannot be read, a `.json` is missing or broken, or none is kept.
    """
    kept = Kept(contents, keep)
    if sum(kept.sizes) == 0:
        raise UserError(
            f"{pattern}: data.keep = {describe(keep)} keeps none of its samples; check the names of "
            "fields and the values"
        )
    return kept


def describe(keep: Keep) -> str:
    return json.dumps({field: list(keep[field]) for field in sorted(keep)})


def kept_rows(
    url: str,
    *,
    keep: Keep,
    tolerant: bool = False,
    index_of: Callable[[str], ShardIndex] = open_index,
) -> Int64:
    """(kept,) rows of one shard, from the cache if they fit, else looked up now and cached.

    tolerant: samples without a label that can be read stay
    """

    def make() -> Int64:
        return np.array(list(_look_up(index_of(url), keep, tolerant)), np.int64)

    return remembered(url, f"kept {tolerant} {describe(keep)}", make)


def _look_up(index: ShardIndex, keep: Keep, tolerant: bool) -> Iterator[int]:
    """Rows whose fields all fit, in order."""
    wanted = [LABEL] * (LABEL in keep) + [RECORD] * any(field != LABEL for field in keep)
    reader = RangeReader()
    try:
        for start in range(0, len(index), READ_AT_ONCE):
            rows = range(start, min(start + READ_AT_ONCE, len(index)))
            members = [_contents(index, rows, extension, reader, tolerant) for extension in wanted]
            for row, texts in zip(rows, zip(*members, strict=True), strict=True):
                name = sample_name(index.url, str(index.keys[row]))
                if _fits(dict(zip(wanted, texts, strict=True)), keep, name, tolerant):
                    yield row
    finally:
        reader.close()


def _contents(
    index: ShardIndex, rows: range, extension: str, reader: RangeReader, tolerant: bool
) -> Sequence[bytes | None]:
    """That member of each sample; None for a label that is not there and need not be."""
    members = find_one(index, (extension,))
    there = [row for row in rows if members.offsets[row] >= 0]
    if len(there) < len(rows) and not (tolerant and extension == LABEL):
        name = sample_name(index.url, str(index.keys[min(set(rows).difference(there))]))
        raise UserError(
            f"{name} has no .{extension}, which data.keep looks into; pack the shard again or keep by other "
            "fields"
        )
    places = [(int(members.offsets[row]), int(members.sizes[row])) for row in there]
    texts = reader.read([Range(index.url, offset, size) for offset, size in places])
    found = dict(zip(there, texts, strict=True))
    return [found.get(row) for row in rows]


def _fits(texts: Mapping[str, bytes | None], keep: Keep, name: str, tolerant: bool) -> bool:
    found: dict[str, object] = {}
    if (record := texts.get(RECORD)) is not None:
        found |= parse_record(record, name)
    if LABEL in texts:
        try:
            found[LABEL] = parse_label(texts[LABEL] or b"", name, None)
        except UserError:
            if not tolerant:
                raise
            return True
    return all(_among(found.get(field), values) for field, values in keep.items())


def _among(found: object, values: Sequence[Value]) -> bool:
    # In Python True equals 1; in JSON it does not.
    return any(
        found == value and isinstance(found, bool) == isinstance(value, bool) for value in values
    )


def parse_json(text: bytes) -> Any:
    """What a JSON file of somebody else's holds. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_record(text: bytes, name: str) -> dict[str, object]:
    """The object in a `.json` member; raises UserError naming the sample."""
    try:
        record = parse_json(text)
    except ValueError as error:
        raise UserError(f"{name}: its .json is broken ({error}); replace or remove it") from error
    if not isinstance(record, dict):
        raise UserError(f"{name}: its .json holds no object with fields; replace or remove it")
    return record
