"""Blocks of remote shards on a local disk, shared by all ranks of a machine, never more than a given
number of bytes.

A block is a file, there in whole or not at all, under a name made of the shard's address, size and
change mark. Ranks that want the same block wait for the one that fetches it. Whoever stores a block
first makes room by deleting those not used for longest; a rank that is reading one keeps what it has
open. All of it holds whenever any rank is killed.
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from data_pipeline.storage import access, facts, fetch
from flows.errors import UserError

BLOCK_BYTES = 4 << 20
# Blocks of one stripe are fetched one after another; so many that two rarely meet.
STRIPES = 256
# Room is made for more than one block, so that not every block has to look through the folder.
KEPT_SHARE = 0.9
KNOWN_SHARDS = 4096
# Of the number of bytes that all blocks have.
DIGITS = 20


class BlockCache:
    """A folder of blocks.

    limit: bytes of blocks that it may hold at any time
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._facts = lru_cache(KNOWN_SHARDS)(facts)
        if limit < BLOCK_BYTES:
            raise UserError(
                f"data.cache_bytes = {limit} is less than one block of {BLOCK_BYTES} bytes; raise it, "
                "or drop data.cache_dir"
            )
        try:
            for name in ("blocks", "locks"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            with self._locked("usage"):
                pass
        except OSError as error:
            raise self._unusable(error) from error

    def read(self, url: str, start: int, end: int, *, attempts: int | None = None) -> bytes:
        """Bytes `start` to `end` of a shard, fewer if it is shorter. Raises OSError."""
        size, mark = self._facts(url)
        shard = hashlib.sha256(f"{url} {size} {mark}".encode()).hexdigest()[:32]
        end = min(end, size)
        parts = []
        for number in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            first = number * BLOCK_BYTES
            last = min(first + BLOCK_BYTES, size)
            path = self.folder / "blocks" / f"{shard}-{number:06d}"
            low, high = max(start, first) - first, min(end, last) - first
            part = _read_block(path, last - first, low, high)
            if part is None:
                part = self._fetch(path, url, first, last, attempts)[low:high]
            parts.append(part)
        return b"".join(parts)

    def _fetch(self, path: Path, url: str, first: int, last: int, attempts: int | None) -> bytes:
        """A whole block: what another rank has stored in the meantime, else from the storage."""
        with self._locked(f"stripe-{hash_of(path.name) % STRIPES:03d}"):
            content = _read_block(path, last - first, 0, last - first)
            if content is None:
                content = fetch(url, first, last, attempts=attempts)
                if len(content) == last - first:
                    try:
                        self._store(path, content)
                    except OSError as error:
                        raise self._unusable(error) from error
        return content

    def _store(self, path: Path, content: bytes) -> None:
        with self._locked("usage") as file:
            used = self._count(file) + len(content)
            if used > self.limit:
                used = self._make_room(len(content)) + len(content)
            # Counted before it lies there: a rank that is killed in between leaves room, not excess.
            # Of one width and in one write, so that there is a number at any time.
            os.pwrite(file, f"{used:0{DIGITS}d}".encode(), 0)
            handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
            with os.fdopen(handle, "wb") as block:
                block.write(content)
            Path(partial).replace(path)

    def _count(self, file: int) -> int:
        """The bytes of blocks as they were last counted, or counted now if nobody has."""
        text = os.pread(file, DIGITS, 0)
        if len(text) == DIGITS and text.isdigit():
            return int(text)
        return sum(size for _, size, _ in self._blocks())

    def _make_room(self, wanted: int) -> int:
        """Delete the blocks not used for longest; the bytes of those that stay."""
        blocks = self._blocks()
        used = sum(size for _, size, _ in blocks)
        for _, size, path in sorted(blocks):
            if used + wanted <= self.limit * KEPT_SHARE:
                break
            Path(path).unlink()
            used -= size
        return used

    def _blocks(self) -> list[tuple[int, int, str]]:
        """(last use, bytes, path) of each block; what a killed writer has left is removed."""
        blocks = []
        for entry in os.scandir(self.folder / "blocks"):
            # Whoever writes holds the lock that is held here: this writer was killed.
            if entry.name.endswith(".partial"):
                Path(entry.path).unlink()
            else:
                blocks.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        return blocks

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"data.cache_dir = {self.folder} cannot be written ({error.strerror}); name another folder, "
            f"or lower data.cache_bytes = {self.limit}"
        )

    @contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        """Alone among all threads and ranks; a holder that is killed lets go."""
        file = os.open(self.folder / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def open_cache() -> BlockCache | None:
    """The cache that this process was told to use. Raises UserError if it cannot be written."""
    told = access()
    return BlockCache(told.cache_dir, told.cache_bytes) if told.cache_dir else None


def hash_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _read_block(path: Path, size: int, low: int, high: int) -> bytes | None:
    """Part of a stored block, which counts as used now; None if it is not there whole."""
    with suppress(FileNotFoundError):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.fstat(file).st_size == size:
                os.utime(file)
                return os.pread(file, high - low, low)
        finally:
            os.close(file)
    return None
