"""Bytes of shards by (URL, offset, size): `pread` on local files, few and patient requests elsewhere.

On remote storage neighbours in a shard come in one request, several requests are in flight at once, and
ranges that will be asked for soon can be named beforehand.
"""

import os
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import RLock
from typing import NamedTuple

from data_pipeline.cache import BlockCache, open_cache
from data_pipeline.storage import GaveUp, access, describe, fetch, patiently, resolve
from flows.errors import UserError

# Well below the usual limit of 1024 open files a process.
KEPT_FILES = 256
# A request costs about as much time as this many bytes: smaller gaps are read and thrown away.
LARGEST_GAP = 512 << 10
# Larger spans are cut, so that they come side by side and none is too much to ask again.
LARGEST_SPAN = 8 << 20
# What may lie ready, and under way, of ranges named beforehand.
AHEAD_BYTES = 256 << 20


class Range(NamedTuple):
    """`size` bytes of the shard at `url`, from `offset`."""

    url: str
    offset: int
    size: int


class Span(NamedTuple):
    """Bytes `start` to `end` of a shard, which hold all of some ranges."""

    url: str
    start: int
    end: int
    ranges: list[Range]


@dataclass
class Pending:
    """A span under way, or here.

    unread: how many of its ranges have not been taken
    """

    span: Span
    content: "Future[bytes]"
    unread: int


class RangeReader:
    """Reads ranges in the order asked for, keeping local files open; threads take turns.

    Errors are UserErrors: a shard has gone, does not answer, or is shorter than when it was indexed.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()
        self._pool: ThreadPoolExecutor | None = None
        self._cache: BlockCache | None = None
        self._ahead: dict[Range, Pending] = {}
        self._ahead_bytes = 0
        # Shards that were given up: asked once, not patiently, until they answer again.
        self._silent: set[str] = set()
        self._turn = RLock()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """The bytes of each range; raises the first UserError."""
        found = []
        for content in self.fetch(ranges):
            if isinstance(content, UserError):
                raise content
            found.append(content)
        return found

    def fetch(self, ranges: Sequence[Range]) -> list[bytes | UserError]:
        """The bytes of each range, or why they could not be read."""
        with self._turn:
            return self._fetch(ranges)

    def _fetch(self, ranges: Sequence[Range]) -> list[bytes | UserError]:
        remote = [part for part in dict.fromkeys(ranges) if not resolve(part.url).local]
        if not remote:
            return [_whole(part, self._local(part)) for part in ranges]
        waiting = {part: self._ahead[part] for part in remote if part in self._ahead}
        for span in coalesce(part for part in remote if part not in waiting):
            waiting |= dict.fromkeys(span.ranges, self._send(span))
        found: dict[Range, bytes | UserError] = {}
        for part in dict.fromkeys(ranges):
            found[part] = self._take(part, waiting[part]) if part in waiting else self._local(part)
        return [_whole(part, found[part]) for part in ranges]

    def expect(self, ranges: Iterable[Range]) -> None:
        """Begin to read remote ranges that will be asked for soon; what is too much is left for then."""
        with self._turn:
            self._expect(ranges)

    def _expect(self, ranges: Iterable[Range]) -> None:
        new = (
            part
            for part in dict.fromkeys(ranges)
            if part not in self._ahead and not resolve(part.url).local
        )
        for span in coalesce(new):
            if self._ahead_bytes + span.end - span.start > AHEAD_BYTES:
                break
            self._ahead |= dict.fromkeys(span.ranges, self._send(span))
            self._ahead_bytes += span.end - span.start

    def forget(self) -> None:
        """Drop what was named beforehand and not asked for."""
        with self._turn:
            for pending in self._ahead.values():
                pending.content.cancel()
            self._ahead, self._ahead_bytes = {}, 0

    def close(self) -> None:
        """Close files and connections; reading opens them again."""
        self.forget()
        while self._files:
            os.close(self._files.popitem()[1])
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _send(self, span: Span) -> Pending:
        if self._pool is None:
            self._cache = open_cache()
            self._pool = ThreadPoolExecutor(access().requests, thread_name_prefix="read")
        return Pending(span, self._pool.submit(self._get, span), len(span.ranges))

    def _get(self, span: Span) -> bytes:
        attempts = 1 if span.url in self._silent else None
        try:
            if self._cache is not None:
                content = self._cache.read(span.url, span.start, span.end, attempts=attempts)
            else:
                content = fetch(span.url, span.start, span.end, attempts=attempts)
        except GaveUp:
            self._silent.add(span.url)
            raise
        self._silent.discard(span.url)
        return content

    def _take(self, part: Range, pending: Pending) -> bytes | UserError:
        if self._ahead.pop(part, None) is not None:
            pending.unread -= 1
            self._ahead_bytes -= 0 if pending.unread else pending.span.end - pending.span.start
        try:
            content = pending.content.result()
        except OSError as error:
            return _unreadable(part.url, error)
        start = part.offset - pending.span.start
        return content[start : start + part.size]

    def _local(self, part: Range) -> bytes | UserError:
        try:
            return os.pread(self._file(part.url), part.size, part.offset)
        except OSError:
            return self._patiently(part)

    def _patiently(self, part: Range) -> bytes | UserError:
        try:
            return patiently(lambda: os.pread(self._file(part.url), part.size, part.offset))
        except OSError as error:
            return _unreadable(part.url, error)

    def _file(self, url: str) -> int:
        if url in self._files:
            self._files.move_to_end(url)
            return self._files[url]
        if len(self._files) >= KEPT_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[url] = os.open(resolve(url).path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[url]


def coalesce(ranges: Iterable[Range]) -> list[Span]:
    """Few spans that hold all ranges: neighbours of one shard together, within a gap and a size."""
    shards: defaultdict[str, list[Range]] = defaultdict(list)
    for part in ranges:
        shards[part.url].append(part)
    spans: list[Span] = []
    for url, parts in shards.items():
        parts.sort(key=lambda part: (part.offset, part.size))
        start = end = parts[0].offset
        inside: list[Range] = []
        for part in parts:
            past = part.offset + part.size
            if part.offset - end > LARGEST_GAP or (inside and past - start > LARGEST_SPAN):
                spans.append(Span(url, start, end, inside))
                start, end, inside = part.offset, part.offset, []
            inside.append(part)
            end = max(end, past)
        spans.append(Span(url, start, end, inside))
    return spans


def _whole(part: Range, content: bytes | UserError) -> bytes | UserError:
    if isinstance(content, UserError) or len(content) == part.size:
        return content
    return UserError(
        f"{part.url}: ends before byte {part.offset + part.size}, where a sample was when the shard "
        "was indexed; copy the shard again"
    )


def _unreadable(url: str, error: OSError) -> UserError:
    gone = isinstance(error, FileNotFoundError)
    remedy = (
        "that it is still there" if gone else "its storage, or raise data.storage.timeout_seconds"
    )
    return UserError(f"{url}: the shard can no longer be read ({describe(error)}); check {remedy}")
