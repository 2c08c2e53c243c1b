"""The indexes of a data set's shards: found, made side by side where they are not, read when needed."""

import itertools
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, TypeVar

from data_pipeline.catalog import (
    Catalog,
    Row,
    Summary,
    copy_indexes,
    open_catalogs,
    summarise,
    write_catalog,
)
from data_pipeline.index import ShardIndex, cached_at, encode, look_at, open_index, signature_of
from data_pipeline.shards import Shard, find, folder_of
from data_pipeline.storage import Facts, access
from flows.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

# An index is some 50 bytes a sample; a lane stays in one shard for long, so few are in use.
KEPT_INDEXES = 512
# Indexes that are made before they are put away: what waits in memory, and what an interrupt costs.
MADE_AT_ONCE = 256


class Indexes:
    """The indexes of some shards by their address, each read when it is asked for.

    summaries: of each shard, or why it has none
    samples: how many each has to have when it is read
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._catalogs = _catalogs_of(shards)
        self.summaries: dict[str, Summary | UserError] = {}
        unknown = []
        for shard in shards:
            if (summary := self._in_catalog(shard)) is not None:
                self.summaries[shard.url] = summary
            else:
                unknown.append(shard)
        self._made: dict[str, ShardIndex] = {}
        made = in_threads(lambda shard: _attempt(lambda: self._make(shard)), unknown)
        self.summaries |= {shard.url: summary for shard, summary in zip(unknown, made, strict=True)}
        self.samples: dict[str, int] = {}
        self._read = lru_cache(KEPT_INDEXES)(self._read_index)

    def __getitem__(self, url: str) -> ShardIndex:
        """Raises UserError for a shard that has none, or has gone or changed since."""
        return self._read(url)

    def load(self, urls: Sequence[str]) -> None:
        """Read several at once, so that asking for each is quick; what fails, fails when asked for."""
        in_threads(lambda url: _attempt(lambda: self._read(url)), urls)

    def _in_catalog(self, shard: Shard) -> Summary | None:
        for catalog in self._catalogs[folder_of(shard.url)]:
            row = catalog.row_of(_file(shard.url), signature_of(shard.facts))
            if row is not None:
                return catalog.summary(row)
        return None

    def _make(self, shard: Shard) -> Summary:
        index = open_index(shard.url, shard.facts)
        if len(self._made) < KEPT_INDEXES:
            self._made[shard.url] = index
        return summarise(index)

    def _read_index(self, url: str) -> ShardIndex:
        if (made := self._made.pop(url, None)) is not None:
            return made
        known = look_at(url)
        index = self._from_catalog(url, known)
        if index is None:
            index = open_index(url, known)
        if len(index) != self.samples.get(url, len(index)):
            raise UserError(
                f"{url}: has {len(index)} samples and had {self.samples[url]} when the run began; put "
                "the shard back, or start again with the new one"
            )
        return index

    def _from_catalog(self, url: str, known: Facts) -> ShardIndex | None:
        for catalog in self._catalogs.get(folder_of(url), []):
            row = catalog.row_of(_file(url), signature_of(known))
            if row is not None and (index := catalog.index(row, url)) is not None:
                return index
        return None


@dataclass
class Updated:
    """What indexing has done.

    files: the catalogs written
    made, kept: shards indexed now, and those that were already
    problems: why a shard could not be indexed, one sentence each
    """

    files: list[str] = field(default_factory=list)
    made: int = 0
    kept: int = 0
    problems: list[str] = field(default_factory=list)


def update_catalogs(pattern: str) -> Updated:
    """Bring the catalog of each folder with shards of `pattern` up to date.

    Only new and changed shards are looked into, several at once; what an interrupted run has
    done is not done again. Raises UserError if the pattern names no shard.
    """
    folders: defaultdict[str, list[Shard]] = defaultdict(list)
    for shard in find(pattern):
        folders[folder_of(shard.url)].append(shard)
    updated = Updated()
    for folder, shards in folders.items():
        _update(folder, shards, updated)
    return updated


def _update(folder: str, shards: list[Shard], updated: Updated) -> None:
    wanted = {_file(shard.url): signature_of(shard.facts) for shard in shards}
    with tempfile.TemporaryFile() as indexes:
        rows: dict[str, Row] = {}
        for catalog in open_catalogs(folder):
            fit = [
                row
                for row in catalog.rows()
                if row.name not in rows and wanted.get(row.name, row.signature) == row.signature
            ]
            with suppress(OSError):
                rows |= {row.name: row for row in copy_indexes(catalog, fit, indexes)}
        new = [shard for shard in shards if _file(shard.url) not in rows]
        updated.kept += len(shards) - len(new)
        made = [row for shard in _batches(new) for row in _add(shard, indexes, updated)]
        updated.made += len(made)
        rows |= {row.name: row for row in made}
        updated.files.append(write_catalog(folder, rows.values(), indexes))
    for shard in new:
        with suppress(OSError):
            cached_at(shard.url).unlink()


def _add(shards: list[Shard], indexes: IO[bytes], updated: Updated) -> Iterator[Row]:
    """Index shards and append the indexes to a file."""
    made = in_threads(lambda shard: _attempt(lambda: open_index(shard.url, shard.facts)), shards)
    for shard, index in zip(shards, made, strict=True):
        if isinstance(index, UserError):
            updated.problems.append(str(index))
            continue
        signature = signature_of(shard.facts)
        content = encode(index, signature)
        start = indexes.seek(0, 2)
        indexes.write(content)
        checksum = zlib.crc32(content)
        yield Row(_file(shard.url), signature, summarise(index), start, len(content), checksum)


def _catalogs_of(shards: Sequence[Shard]) -> dict[str, list[Catalog]]:
    folders = dict.fromkeys(folder_of(shard.url) for shard in shards)
    return {folder: open_catalogs(folder) for folder in folders}


def _file(url: str) -> str:
    return url.rpartition("/")[2]


def _batches(shards: list[Shard]) -> Iterator[list[Shard]]:
    iterator = iter(shards)
    while batch := list(itertools.islice(iterator, MADE_AT_ONCE)):
        yield batch


def _attempt(make: Callable[[], T]) -> T | UserError:
    try:
        return make()
    except UserError as error:
        return error


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The results of `function`, several computed at once."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(access().requests, len(items))) as pool:
        return list(pool.map(function, items))
