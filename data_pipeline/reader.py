"""Bytes of shards by (URL, offset, size): `pread` on local files, ranged requests elsewhere."""

import os
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from data_pipeline.shards import resolve
from flows.errors import UserError

# Well below the usual limit of 1024 open files a process.
KEPT_FILES = 256


class Range(NamedTuple):
    """`size` bytes of the shard at `url`, from `offset`."""

    url: str
    offset: int
    size: int


class RangeReader:
    """Reads ranges in the order asked for, keeping local files open; for one thread at a time.

    Raises UserError if a shard has gone, or is shorter than when it was indexed.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        found: list[bytes] = [b""] * len(ranges)
        remote: defaultdict[int, list[int]] = defaultdict(list)
        for number, part in enumerate(ranges):
            if resolve(part.url).local:
                found[number] = self._read_local(part)
            else:
                remote[id(resolve(part.url).storage)].append(number)
        for numbers in remote.values():
            parts = [ranges[number] for number in numbers]
            for number, content in zip(numbers, _read_remote(parts), strict=True):
                found[number] = content
        for part, content in zip(ranges, found, strict=True):
            if len(content) != part.size:
                raise UserError(
                    f"{part.url}: ends before byte {part.offset + part.size}, where a sample was "
                    "when the shard was indexed; copy the shard again"
                )
        return found

    def close(self) -> None:
        """Close the files kept open; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _read_local(self, part: Range) -> bytes:
        try:
            return os.pread(self._file(part.url), part.size, part.offset)
        except OSError as error:
            raise _unreadable(part.url, error) from error

    def _file(self, url: str) -> int:
        if url in self._files:
            self._files.move_to_end(url)
            return self._files[url]
        if len(self._files) >= KEPT_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[url] = os.open(resolve(url).path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[url]


def _read_remote(parts: Sequence[Range]) -> list[bytes]:
    """Ranges of shards on one storage, requested together."""
    paths = [resolve(part.url).path for part in parts]
    starts = [part.offset for part in parts]
    ends = [part.offset + part.size for part in parts]
    try:
        # An explicit `raise`: by default errors come back in place of bytes.
        return list(resolve(parts[0].url).storage.cat_ranges(paths, starts, ends, on_error="raise"))
    except OSError as error:
        raise _unreadable(parts[0].url, error) from error


def _unreadable(url: str, error: OSError) -> UserError:
    return UserError(
        f"{url}: the shard can no longer be read ({error}); check that it is still there"
    )
