"""Where every sample of a shard lies, read from the tar's headers once and kept in a small file.

The indexes of a folder's shards lie together in one file beside them (see `catalog`), made by
`flowmill data index`; one made in passing lies in the user's cache folder, so that training never
writes among the data. Either is believed only while the shard's size and change mark are those it
was made for. The file is a NumPy archive without pickles.
"""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipeline.headers import Member, printable, read_members
from data_pipeline.npy import read_npz
from data_pipeline.storage import Facts, describe, facts, resolve
from data_pipeline.storing import replaced_whole
from data_pipeline.wds2idx import import_idx
from flows.errors import UserError

VERSION = 2
# Formats that run code when they are read; nothing in the stream may ask for that.
PICKLES = frozenset({"pyd", "pickle", "pkl", "pth", "pt"})
IMAGE_FILES = ("png", "jpg", "jpeg", "webp")
LATENT = "latent.npy"
# What a sample has one of: an image, or the latent that stands for it.
IMAGES = (*IMAGE_FILES, LATENT)


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


def open_index(url: str, known: Facts | None = None) -> ShardIndex:
    """The index of a shard: from the cache if one fits, else made now and cached.

    known: what the storage has told of the shard, if it was asked already
    Raises UserError for a shard that is missing, damaged or not safe to read.
    """
    known = known or look_at(url)
    stored = cached_at(url)
    with contextlib.suppress(OSError):
        if (index := decode(stored.read_bytes(), url, signature_of(known))) is not None:
            return index
    index = make_index(url, known)
    # The index is in hand; a cache that cannot be written costs the next run a scan, no more.
    with contextlib.suppress(OSError):
        write_whole(stored, encode(index, signature_of(known)))
    return index


def look_at(url: str) -> Facts:
    """Size and change mark of a shard. Raises UserError if it is not there."""
    try:
        return facts(url)
    except OSError as error:
        raise UserError(
            f"{url}: the shard cannot be found ({describe(error)}); check the path"
        ) from error


def make_index(url: str, known: Facts) -> ShardIndex:
    """The index of a shard, from what `wds2idx` has left beside it or else from its headers."""
    # Whatever is wrong with that file, the shard's own headers have the last word.
    with contextlib.suppress(UserError):
        if (members := import_idx(url, known)) is not None:
            return _gather(url, members)
    return scan(url)


def scan(url: str) -> ShardIndex:
    """Read every header of a shard.

    Raises UserError, naming shard and member, for a truncated or damaged tar, a duplicate key, a
    path that leads outside, a link, a device or a pickle.
    """
    return _gather(url, read_members(url))


def split_name(name: str) -> tuple[str | None, str]:
    """A member's key and extension, cut at the first dot of the file name as WebDataset does.

    Key None: not part of a sample (no extension, or a hidden file).
    """
    folder, _, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    if not stem or not dot:
        return None, ""
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def signature_of(known: Facts) -> str:
    """What an index is stored under: it changes when the shard does."""
    return f"{VERSION} {known.size} {known.mark}"


def encode(index: ShardIndex, signature: str) -> bytes:
    """An index as a file."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        signature=np.array(signature),
        keys=index.keys,
        extensions=np.array(index.extensions, np.str_),
        offsets=index.offsets,
        sizes=index.sizes,
    )
    return buffer.getvalue()


def decode(content: bytes, url: str, signature: str) -> ShardIndex | None:
    """A stored index, or None if it is damaged or was made for other content."""
    try:
        arrays = read_npz(content)
        if str(arrays["signature"]) != signature:
            return None
        extensions = tuple(str(name) for name in arrays["extensions"])
        index = ShardIndex(url, arrays["keys"], extensions, arrays["offsets"], arrays["sizes"])
    except (ValueError, KeyError):
        return None
    shape = (len(index.keys), len(extensions))
    return index if index.offsets.shape == index.sizes.shape == shape else None


def cached_at(url: str, suffix: str = ".npz") -> Path:
    """Where this user's cache keeps what belongs to an address."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    absolute = str(Path(url).resolve()) if resolve(url).local else url
    name = hashlib.sha256(absolute.encode()).hexdigest()[:32]
    return home / "flowmill" / "index" / f"{name}{suffix}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, whoever else writes it."""
    with replaced_whole(path) as file:
        file.write_bytes(content)


def _gather(url: str, members: Iterable[Member]) -> ShardIndex:
    """Members by sample. Raises UserError for a pickle and a duplicate key."""
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in members:
        key, extension = split_name(name)
        if key is None:
            continue
        if extension.rpartition(".")[2] in PICKLES:
            raise UserError(
                f"{url}: member {printable(name)} is a pickle and could run code; remove it"
            )
        row = rows.setdefault(key, {})
        if extension in row:
            shown = printable(key)
            raise UserError(
                f"{url}: duplicate key {shown}: two members {shown}.{printable(extension)}; pack it again"
            )
        row[extension] = (offset, size)
    return _tabulate(url, rows)


def _tabulate(url: str, rows: dict[str, dict[str, tuple[int, int]]]) -> ShardIndex:
    extensions = tuple(sorted({extension for row in rows.values() for extension in row}))
    absent = (-1, 0)
    table = [[row.get(extension, absent) for extension in extensions] for row in rows.values()]
    places = np.array(table, np.int64).reshape(len(rows), len(extensions), 2)
    keys = np.array(list(rows), np.str_)
    return ShardIndex(url, keys, extensions, places[..., 0].copy(), places[..., 1].copy())
