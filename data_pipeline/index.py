"""Where every sample of a shard lies, read from the tar's headers once and kept in a small file.

An index made by `flowmill data index` lies beside its shard (`x.tar.index.npz`); one made in
passing lies in the user's cache folder, so that training never writes among the data. Either is
believed only while the shard's size and time of change are those it was made for. The file is a
NumPy archive without pickles.
"""

import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import Place, resolve
from flows.errors import UserError

SUFFIX = ".index.npz"
VERSION = 1
# Formats that run code when they are read; nothing in the stream may ask for that.
PICKLES = frozenset({"pyd", "pickle", "pkl", "pth", "pt"})
IMAGES = ("png", "jpg", "jpeg", "webp")
# What storages call the mark that changes with the content, the most telling first.
CHANGE_MARKS = ("mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "created")
BLOCK = tarfile.BLOCKSIZE
# Headers of remote shards come with the data between them, in reads of this many bytes.
READ_AHEAD = 4 << 20


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, in file order.

    keys: (samples,) member names without extension
    extensions: what follows the first dot of member names, in lower case
    offsets, sizes: (samples, extensions) int64 bytes in the shard; offset -1 where a sample has no
        such member
    """

    url: str
    keys: NDArray[np.str_]
    extensions: tuple[str, ...]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)

    def column(self, extension: str) -> int | None:
        """The column of an extension, or None if no sample of the shard has it."""
        return self.extensions.index(extension) if extension in self.extensions else None


def open_index(url: str) -> ShardIndex:
    """The index of a shard: from beside it or the cache if one fits, else made now and cached.

    Raises UserError for a shard that is missing, damaged or not safe to read.
    """
    place = resolve(url)
    signature = sign(url, place)
    for stored in (_beside(place), _in_cache(url)):
        if index := _load(stored, url, signature):
            return index
    index = scan(url)
    # The index is in hand; a cache that cannot be written costs the next run a scan, no more.
    with contextlib.suppress(OSError):
        _store(_in_cache(url), index, signature)
    return index


def write_index(url: str) -> str:
    """Make the index of a shard anew; returns its place: beside it, or the cache if that fails."""
    place = resolve(url)
    signature = sign(url, place)
    index = scan(url)
    try:
        _store(_beside(place), index, signature)
        return url + SUFFIX
    except OSError:
        _store(_in_cache(url), index, signature)
        return _in_cache(url).path


def sign(url: str, place: Place) -> str:
    """What changes when the shard does: its size and, if the storage has one, its change mark."""
    try:
        facts = place.storage.info(place.path)
    except OSError as error:
        raise UserError(f"{url}: the shard cannot be found ({error}); check the path") from error
    mark = next((facts[name] for name in CHANGE_MARKS if facts.get(name)), "")
    return f"{VERSION} {facts['size']} {mark}"


def scan(url: str) -> ShardIndex:
    """Read every header of a shard.

    Raises UserError, naming shard and member, for a truncated or damaged tar, a duplicate key, a
    path that leads outside, a link, a device or a pickle.
    """
    place = resolve(url)
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with _open_shard(place) as stream:
            for name, offset, size in _members(stream, url):
                key, extension = split_name(name)
                if key is None:
                    continue
                if extension.rpartition(".")[2] in PICKLES:
                    raise UserError(
                        f"{url}: member {name} is a pickle and could run code; remove it"
                    )
                row = rows.setdefault(key, {})
                if extension in row:
                    raise UserError(
                        f"{url}: duplicate key {key}: two members {key}.{extension}; pack it again"
                    )
                row[extension] = (offset, size)
    except tarfile.TarError as error:
        raise UserError(
            f"{url}: not a whole uncompressed tar ({error}); copy or pack the shard again"
        ) from error
    except IsADirectoryError as error:
        raise UserError(f"{url} is a folder; name the shards in it, as in {url}/*.tar") from error
    except OSError as error:
        raise UserError(
            f"{url}: the shard cannot be read ({error}); check its permissions"
        ) from error
    return _tabulate(url, rows)


def split_name(name: str) -> tuple[str | None, str]:
    """A member's key and extension, cut at the first dot of the file name as WebDataset does.

    Key None: not part of a sample (no extension, or a hidden file).
    """
    folder, _, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot:
        return None, ""
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _open_shard(place: Place) -> Any:
    if place.local:
        return Path(place.path).open("rb", buffering=0)
    return place.storage.open(place.path, "rb", block_size=READ_AHEAD)


def _members(stream: IO[bytes], url: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular member, once it is known to be safe."""
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while member := archive.next():
            # tarfile keeps all it has seen; a shard can hold millions.
            archive.members = []  # type: ignore[attr-defined]
            if member.isdir():
                continue
            _refuse_unsafe(member, url)
            yield member.name, member.offset_data, member.size
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
    if not member.isreg() or member.issparse():
        kind = "link" if member.issym() or member.islnk() else "device or special file"
        raise UserError(f"{url}: member {member.name} is a {kind}; a shard holds plain files only")
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{url}: member {member.name} leads outside the shard; pack it again")


def _tabulate(url: str, rows: dict[str, dict[str, tuple[int, int]]]) -> ShardIndex:
    extensions = tuple(sorted({extension for row in rows.values() for extension in row}))
    absent = (-1, 0)
    table = [[row.get(extension, absent) for extension in extensions] for row in rows.values()]
    places = np.array(table, np.int64).reshape(len(rows), len(extensions), 2)
    keys = np.array(list(rows), np.str_)
    return ShardIndex(url, keys, extensions, places[..., 0].copy(), places[..., 1].copy())


def _beside(place: Place) -> Place:
    return place._replace(path=place.path + SUFFIX)


def _in_cache(url: str) -> Place:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    absolute = str(Path(url).resolve()) if resolve(url).local else url
    name = hashlib.sha256(absolute.encode()).hexdigest()[:32]
    return resolve(str(home / "flowmill" / "index" / f"{name}.npz"))


def _load(stored: Place, url: str, signature: str) -> ShardIndex | None:
    """A stored index, or None if there is none, it is damaged, or it was made for other content."""
    try:
        content = stored.storage.cat_file(stored.path)
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            if str(arrays["signature"]) != signature:
                return None
            extensions = tuple(str(name) for name in arrays["extensions"])
            index = ShardIndex(url, arrays["keys"], extensions, arrays["offsets"], arrays["sizes"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    shape = (len(index.keys), len(extensions))
    return index if index.offsets.shape == index.sizes.shape == shape else None


def _store(stored: Place, index: ShardIndex, signature: str) -> None:
    """Write an index; on a local disk it appears whole or not at all, whoever else writes it."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        signature=np.array(signature),
        keys=index.keys,
        extensions=np.array(index.extensions, np.str_),
        offsets=index.offsets,
        sizes=index.sizes,
    )
    if not stored.local:
        stored.storage.pipe_file(stored.path, buffer.getvalue())
        return
    path = Path(stored.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        file.write(buffer.getvalue())
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)
