"""Which shards a pattern names: braces and globs, on any storage, and the embedded data sets."""

import glob
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from braceexpand import braceexpand

from data_pipeline.storage import (
    Facts,
    access,
    call,
    describe,
    facts_of,
    patiently,
    remedy,
    resolve,
)
from flows.errors import UserError

EMBEDDED = "embedded:"
# More names than any data set has shards.
MOST_NAMES = 10_000_000
RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)")
CHECK = "check that the address is right, that its server runs, and your rights"
# From so many named shards of a folder on, it is quicker to list the folder than to ask for each.
LISTED_FROM = 16
# Web servers have no listing to rely on.
UNLISTED = frozenset({"http", "https"})


class Shard(NamedTuple):
    """A shard as its storage tells of it.

    url: its address
    facts: its size and change mark
    """

    url: str
    facts: Facts


def embedded_folder() -> Path:
    """The data sets that come with the package."""
    return Path(str(files("data_pipeline"))) / "embedded"


def embedded_sets() -> list[str]:
    return sorted(path.name for path in embedded_folder().iterdir() if path.is_dir())


def expand(pattern: str, what: str = "shard") -> tuple[str, ...]:
    """Every shard that `pattern` names, sorted, each once; see `find`."""
    return tuple(shard.url for shard in find(pattern, what))


def find(pattern: str, what: str = "shard") -> tuple[Shard, ...]:
    """Every shard that `pattern` names, sorted by address, each once.

    `{000000..000003}` and `{a,b}` name shards that must exist; `*`, `?` and `[...]` match those
    that do. `embedded:digits28/train-*.tar` looks among the data sets that come with the package.

    what: messages call them

    Raises UserError if a named shard is missing or nothing matches.
    """
    found, missing = search(pattern)
    if missing:
        named = what if missing[0] == pattern else f"{what} {missing[0]}"
        raise UserError(f"{pattern}: there is no {named} at that place; {_instead_of(pattern)}")
    return found


def _instead_of(pattern: str) -> str:
    if not pattern.startswith(EMBEDDED):
        return "check the path and the pattern"
    sets = " or ".join(embedded_sets())
    return f"write embedded:SET/train-*.tar or embedded:SET/heldout-*.tar, where SET is {sets}"


def search(pattern: str) -> tuple[tuple[Shard, ...], list[str]]:
    """The shards that are there, sorted by address, and the names that lead to none."""
    names = _names(pattern)
    found: dict[str, Shard] = {}
    missing: list[str] = []
    try:
        for name, shards in _search_all(names):
            found.update((shard.url, shard) for shard in shards)
            missing += [] if shards else [name]
    except OSError as error:
        raise UserError(
            f"{pattern}: cannot be listed ({describe(error)}); {remedy(error, CHECK)}"
        ) from error
    return tuple(found[url] for url in sorted(found)), sorted(missing)


def _names(pattern: str) -> list[str]:
    """What the braces of a pattern stand for, each once."""
    # All of a range is in memory before the first name is: the longest is looked at beforehand.
    try:
        longest = max((abs(int(b) - int(a)) for a, b in RANGE.findall(pattern)), default=0)
        expanded = braceexpand(pattern) if longest < MOST_NAMES else ()
        names = list(itertools.islice(expanded, MOST_NAMES + 1))
    except ValueError as error:
        raise UserError(
            f"{pattern}: braces that do not pair; write {{00..07}} or {{a,b}}"
        ) from error
    if not 0 < len(names) <= MOST_NAMES:
        raise UserError(
            f"{pattern}: its braces stand for more than {MOST_NAMES:,} shards; write a shorter range, or *"
        )
    # `digits/` is the folder `digits`.
    return list(
        dict.fromkeys(name.rstrip("/") if "://" not in name[-3:] else name for name in names)
    )


def _search_all(names: list[str]) -> Iterator[tuple[str, list[Shard]]]:
    """Each name with the shards it leads to."""
    folders: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        if any(mark in name for mark in "*?["):
            yield name, _match(locate_embedded(name))
        else:
            folders[folder_of(name)].append(name)
    for plain in folders.values():
        # All lie in the folder of the first, so its address tells theirs.
        folder = folder_of(address(plain[0]))
        for name, known in zip(plain, _look_for(plain), strict=True):
            url = f"{folder}/{name.rpartition('/')[2]}"
            yield name, [] if known is None else [Shard(url, known)]


def _match(url: str) -> list[Shard]:
    place = resolve(url)
    if place.local:
        found = ((path, _stat(path)) for path in glob.iglob(place.path, recursive=True))  # noqa: PTH207
        return [Shard(path, known) for path, known in found if known is not None]
    try:
        matches = patiently(lambda: call(place.storage, "glob", place.path, detail=True))
    except FileNotFoundError:
        return []  # as of a folder that is not there: so do some drivers say, and some do not
    return [
        Shard(_address_of(url, path), facts_of(info))
        for path, info in matches.items()
        if info["type"] != "directory"
    ]


def address(name: str) -> str:
    """The full address of a shard that is named without a pattern."""
    url = locate_embedded(name)
    return _address_of(url, resolve(url).path)


def _address_of(url: str, path: str) -> str:
    """The full address of a path on the storage that `url` lies on."""
    place = resolve(url)
    # fsspec forgets the `simplecache::` of `simplecache::s3://bucket/x` on the way back.
    chain = url[: url.rfind("::") + 2] if "::" in url else ""
    return path if place.local else chain + str(place.storage.unstrip_protocol(path))


def _look_for(names: list[str]) -> Iterable[Facts | None]:
    """The facts of shards of one folder, None for those that are not there: from its listing if they are
    many, else one by one."""
    place = resolve(locate_embedded(names[0]))
    if place.local:
        folder = folder_of(place.path)
        return [_stat(f"{folder}/{name.rpartition('/')[2]}") for name in names]
    protocols = place.storage.protocol
    unlisted = UNLISTED & ({protocols} if isinstance(protocols, str) else set(protocols))
    if len(names) < LISTED_FROM or unlisted:
        with ThreadPoolExecutor(access().requests) as pool:
            return list(pool.map(_look, names))
    folder = folder_of(place.path)
    try:
        listing = patiently(lambda: call(place.storage, "ls", folder, detail=True))
    except FileNotFoundError:
        return [None] * len(names)
    known = {info["name"]: facts_of(info) for info in listing if info["type"] != "directory"}
    return [known.get(f"{folder}/{name.rpartition('/')[2]}") for name in names]


def _look(name: str) -> Facts | None:
    """The facts of one remote file, None if it is not there."""
    place = resolve(name)
    try:
        info = patiently(lambda: call(place.storage, "info", place.path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if info["type"] == "directory":
        raise _is_folder(name)
    return facts_of(info)


def _stat(path: str) -> Facts | None:
    """The facts of a local file, None if it is not there. Raises UserError for a folder."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a hundred thousand of them in a moment
    except (FileNotFoundError, NotADirectoryError):
        return None
    if S_ISDIR(status.st_mode):
        raise _is_folder(path)
    return Facts(status.st_size, str(status.st_mtime))


def _is_folder(path: str) -> UserError:
    return UserError(f"{path} is a folder; name the shards in it, as in {path}/*.tar")


def locate_embedded(name: str) -> str:
    """`embedded:...` as a path into the package; anything else as it is."""
    if not name.startswith(EMBEDDED):
        return name
    inside = name.removeprefix(EMBEDDED)
    if ".." in Path(inside).parts or Path(inside).is_absolute():
        raise UserError(f"{name}: embedded data lies inside the package; drop `..` and `/`")
    return str(embedded_folder() / inside)


def short_names(urls: tuple[str, ...]) -> tuple[str, ...]:
    """Shards by their path below the deepest folder that all share, without `.tar`.

    Unique within a data set, and the same wherever the data set lies.
    """
    parts = [url.split("/") for url in urls]
    levels = zip(*(part[:-1] for part in parts), strict=False)
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    return tuple("/".join(part[shared:]).removesuffix(".tar") for part in parts)


def folder_of(url: str) -> str:
    """The folder a shard lies in; empty for a file named without one."""
    return url.rpartition("/")[0]
