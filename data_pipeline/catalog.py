"""The indexes of a folder's shards in one file, `flowmill.index`.

    head | table: one row a shard | the shards' indexes, one after another

Opening reads head and table alone: memory and time go with the number of shards, not of samples.
The index of one shard is one ranged read. Rows carry the shard's size and change mark; a row that
does not fit its shard counts for nothing.
"""

import io
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.index import ShardIndex, cached_at, decode
from data_pipeline.npy import read_npz
from data_pipeline.storage import fetch, patiently, resolve
from data_pipeline.storing import replaced_whole

NAME = "flowmill.index"
MAGIC = b"FLOWIDX1"
# Magic word, bytes of the table, checksum of the table.
HEAD = struct.Struct("<8sQI")
COPIED_AT_ONCE = 16 << 20
# What drivers say that cannot write, or may not.
UNWRITABLE = (OSError, NotImplementedError)


class Summary(NamedTuple):
    """What opening a data set needs to know of a shard.

    samples: how many it has
    extensions: of its members
    uniform: every sample has a member with each of them
    """

    samples: int
    extensions: tuple[str, ...]
    uniform: bool


class Row(NamedTuple):
    """A shard in a catalog: its file name, what its index was made for, and where that index lies."""

    name: str
    signature: str
    summary: Summary
    start: int
    length: int
    checksum: int


def summarise(index: ShardIndex) -> Summary:
    return Summary(len(index), index.extensions, bool((index.offsets >= 0).all()))


@dataclass(frozen=True)
class Catalog:
    """An open catalog: its table, and where its file is."""

    url: str
    base: int
    names: dict[str, int]
    signatures: list[bytes]
    samples: NDArray[np.int64]
    kinds: list[tuple[str, ...]]
    kind: NDArray[np.int64]
    uniform: NDArray[np.bool_]
    places: NDArray[np.int64]

    def row_of(self, name: str, signature: str) -> int | None:
        """The row of a shard as it is now, if there is one."""
        row = self.names.get(name)
        fits = row is not None and self.signatures[row] == signature.encode()
        return row if fits else None

    def summary(self, row: int) -> Summary:
        kind = self.kinds[self.kind[row]]
        return Summary(int(self.samples[row]), kind, bool(self.uniform[row]))

    def index(self, row: int, url: str) -> ShardIndex | None:
        """The index of a shard; None if the file is no longer what it was when it was opened."""
        start, length, checksum = self.places[row].tolist()
        with suppress(OSError):
            content = fetch(self.url, self.base + start, self.base + start + length)
            if zlib.crc32(content) == checksum:
                return decode(content, url, self.signatures[row].decode())
        return None

    def rows(self) -> Iterator[Row]:
        for name, row in self.names.items():
            start, length, checksum = self.places[row].tolist()
            signature = self.signatures[row].decode()
            yield Row(name, signature, self.summary(row), start, length, checksum)


@lru_cache(8)
def open_catalogs(folder: str) -> list[Catalog]:
    """The catalogs of a folder: the one beside its shards, and this user's own."""
    places = (beside(folder), str(cached_at(beside(folder), ".index")))
    return [catalog for place in places if (catalog := open_catalog(place)) is not None]


def beside(folder: str) -> str:
    return f"{folder}/{NAME}" if folder else NAME


def open_catalog(url: str) -> Catalog | None:
    """A catalog; None if there is none, or it is damaged."""
    try:
        magic, length, checksum = HEAD.unpack(fetch(url, 0, HEAD.size))
        table = fetch(url, HEAD.size, HEAD.size + length) if magic == MAGIC else b""
        if zlib.crc32(table) != checksum:
            return None
        arrays = read_npz(table)
        return Catalog(
            url=url,
            base=HEAD.size + length,
            names={n.decode(): row for row, n in enumerate(arrays["names"].tolist())},
            signatures=arrays["signatures"].tolist(),
            samples=arrays["samples"],
            kinds=[tuple(kind.split()) for kind in arrays["kinds"].tolist()],
            kind=arrays["kind"],
            uniform=arrays["uniform"],
            places=arrays["places"],
        )
    except (OSError, ValueError, KeyError, struct.error):
        return None


def write_catalog(folder: str, rows: Iterable[Row], indexes: IO[bytes]) -> str:
    """Write a folder's catalog beside its shards, or into the user's cache where that is not allowed.

    indexes: file in which the rows' indexes lie
    Returns its place; readers find the old file or the new one, no mixture.
    """
    ordered = sorted(rows)
    content = _table(ordered)
    with tempfile.NamedTemporaryFile(suffix=NAME) as file:
        file.write(HEAD.pack(MAGIC, len(content), zlib.crc32(content)) + content)
        for row in ordered:
            indexes.seek(row.start)
            file.write(indexes.read(row.length))
        file.flush()
        try:
            return _put(file.name, beside(folder))
        except UNWRITABLE:
            return _put(file.name, str(cached_at(beside(folder), ".index")))
        finally:
            open_catalogs.cache_clear()


def copy_indexes(catalog: Catalog, rows: Iterable[Row], into: IO[bytes]) -> Iterator[Row]:
    """Append rows' indexes to a file, in few reads; the rows with their new places.

    A row whose index is damaged is left out. Raises OSError if the catalog can no longer be read.
    """
    part: list[Row] = []
    for row in sorted(rows, key=lambda row: row.start):
        if part and _end(row) - part[0].start > COPIED_AT_ONCE:
            yield from _copy(catalog, part, into)
            part = []
        part.append(row)
    if part:
        yield from _copy(catalog, part, into)


def _copy(catalog: Catalog, rows: list[Row], into: IO[bytes]) -> Iterator[Row]:
    first = rows[0].start
    content = fetch(catalog.url, catalog.base + first, catalog.base + _end(rows[-1]))
    for row in rows:
        part = content[row.start - first : _end(row) - first]
        if zlib.crc32(part) == row.checksum:
            start = into.seek(0, io.SEEK_END)
            into.write(part)
            yield row._replace(start=start)


def _end(row: Row) -> int:
    return row.start + row.length


def _table(rows: list[Row]) -> bytes:
    kinds = sorted({" ".join(row.summary.extensions) for row in rows})
    number = {kind: at for at, kind in enumerate(kinds)}
    starts = np.cumsum([0, *(row.length for row in rows)])[:-1]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        names=np.array([row.name.encode() for row in rows], np.bytes_),
        signatures=np.array([row.signature.encode() for row in rows], np.bytes_),
        samples=np.array([row.summary.samples for row in rows], np.int64),
        kinds=np.array(kinds, np.str_),
        kind=np.array([number[" ".join(row.summary.extensions)] for row in rows], np.int64),
        uniform=np.array([row.summary.uniform for row in rows], np.bool_),
        places=np.array(
            [(s, r.length, r.checksum) for s, r in zip(starts, rows, strict=True)], np.int64
        ).reshape(-1, 3),
    )
    return buffer.getvalue()


def _put(source: str, target: str) -> str:
    place = resolve(target)
    if not place.local:
        # No time limit: a large file takes as long as it takes.
        patiently(lambda: place.storage.put_file(source, place.path))
        return target
    with replaced_whole(Path(place.path)) as file:
        shutil.copyfile(source, file)
    return target
