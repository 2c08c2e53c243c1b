"""The members of a tar, read from its headers alone, and refused where one is not safe to read."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISREG
from typing import IO, NamedTuple
from unicodedata import category

from data_pipeline.storage import describe, facts, fetch, resolve
from flows.errors import UserError

BLOCK = tarfile.BLOCKSIZE
# Headers of remote shards come with the data between them, in reads of this many bytes.
READ_AHEAD = 4 << 20
# Control characters, and what Python makes of bytes that are not UTF-8.
UNSHOWN = frozenset({"Cc", "Cs"})


class Member(NamedTuple):
    """A file in a tar: its name, and where its content lies."""

    name: str
    offset: int
    size: int


class RemoteFile(io.RawIOBase):
    """A remote file to read and seek in; its blocks come by patient requests, larger gaps are not read."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._size = facts(url).size
        self._place = 0
        self._start, self._content = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        )
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._place + size, self._size)
        if not self._start <= self._place <= end <= self._start + len(self._content):
            self._start = self._place
            last = min(max(end, self._place + READ_AHEAD), self._size)
            self._content = fetch(self._url, self._place, last) if last > self._place else b""
        part = self._content[self._place - self._start : max(end, self._place) - self._start]
        self._place += len(part)
        return part


def read_members(url: str) -> Iterator[Member]:
    """Every regular member of a shard, in its order.

    Raises UserError, naming shard and member, for a truncated or damaged tar, a path that leads
    outside, a link or a device, and for a shard that is itself no regular file.
    """
    place = resolve(url)
    try:
        if place.local:
            _refuse_special(place.path, url)
        with Path(place.path).open("rb", buffering=0) if place.local else RemoteFile(url) as stream:
            yield from _walk(stream, url)  # type: ignore[arg-type]
    except tarfile.TarError as error:
        raise UserError(
            f"{url}: not a whole uncompressed tar ({error}); copy or pack the shard again"
        ) from error
    except (ValueError, OverflowError) as error:
        # tarfile lets out what int() and seek() say of the numbers in extended headers.
        raise UserError(
            f"{url}: a header of the tar is damaged ({describe(error)}); copy or pack the shard again"
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{url} is a folder; name the shards in it, as in {url}/*.tar") from error
    except OSError as error:
        raise UserError(
            f"{url}: the shard cannot be read ({describe(error)}); check its permissions"
        ) from error


def _refuse_special(path: str, url: str) -> None:
    """Opening a pipe would wait for ever for its other end."""
    mode = Path(path).stat().st_mode
    if not S_ISREG(mode) and not S_ISDIR(mode):
        raise UserError(
            f"{url}: not a regular file but a pipe, socket or device; put a tar in its place, or name "
            "the shards without it"
        )


def _walk(stream: IO[bytes], url: str) -> Iterator[Member]:
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while member := archive.next():
            # tarfile keeps all it has seen; a shard can hold millions.
            archive.members = []  # type: ignore[attr-defined]
            if member.isdir():
                continue
            _refuse_unsafe(member, url)
            yield Member(member.name, member.offset_data, member.size)
        end = archive.offset
    # tarfile takes a cut between members, and a damaged header, for the end of the archive.
    stream.seek(end)
    if stream.read(BLOCK) != bytes(BLOCK):
        raise UserError(
            f"{url}: no end mark at byte {end}: truncated or damaged; copy or pack the shard again"
        )
    if stream.read(READ_AHEAD).strip(b"\0"):
        raise UserError(f"{url}: data after its end mark at byte {end}; pack joined tars again")


def _refuse_unsafe(member: tarfile.TarInfo, url: str) -> None:
    refuse_name(member.name, url)
    if not member.isreg() or member.issparse():
        kind = "link" if member.issym() or member.islnk() else "device or special file"
        raise UserError(
            f"{url}: member {printable(member.name)} is a {kind}; a shard holds plain files only"
        )


def refuse_name(name: str, url: str) -> None:
    """Raises UserError for a member that would be written outside the folder it is unpacked in, and for
    one whose name is not UTF-8, so that no report could hold it."""
    if name.encode("utf-8", "ignore").decode() != name:
        raise UserError(f"{url}: member {printable(name)} has a name that is not UTF-8; rename it")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{url}: member {printable(name)} leads outside the shard; pack it again")


def printable(name: str) -> str:
    """A name as messages show it: `\\x1b`, `\\n`, `\\udc..` for what would move the cursor, colour the
    terminal or break the line, and for each byte that is not UTF-8."""
    if name.isprintable():
        return name
    return "".join(
        letter.encode("unicode_escape").decode() if category(letter) in UNSHOWN else letter
        for letter in name
    )


def sample_name(url: str, key: str) -> str:
    """What messages call a sample."""
    return f"{url}: sample {printable(key)}"
