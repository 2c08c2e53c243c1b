"""Which shards a pattern names: braces and globs, on any storage, and the embedded data sets."""

import itertools
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from braceexpand import braceexpand

from flows.errors import UserError

EMBEDDED = "embedded:"


class Place(NamedTuple):
    """Where a URL leads: an fsspec file system and a path in it.

    local: the path is a plain file of this machine
    """

    storage: Any
    path: str
    local: bool


def embedded_folder() -> Path:
    """The data sets that come with the package."""
    return Path(str(files("data_pipeline"))) / "embedded"


def expand(pattern: str) -> tuple[str, ...]:
    """Every shard that `pattern` names, sorted, each once.

    `{000000..000003}` and `{a,b}` name shards that must exist; `*`, `?` and `[...]` match those
    that do. `embedded:digits28/train-*.tar` looks among the data sets that come with the package.

    Raises UserError if a named shard is missing or nothing matches.
    """
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(
            f"{pattern}: braces that do not pair; write {{00..07}} or {{a,b}}"
        ) from error
    found: set[str] = set()
    for name in names:
        found.update(_match(name, pattern))
    return tuple(sorted(found))


def _match(name: str, pattern: str) -> list[str]:
    url = locate_embedded(name)
    place = resolve(url)
    try:
        if any(mark in url for mark in "*?["):
            paths = place.storage.glob(place.path)
        else:
            paths = [place.path] if place.storage.exists(place.path) else []
    except OSError as error:
        raise UserError(
            f"{pattern}: cannot be listed ({error}); check address and rights"
        ) from error
    if not paths:
        what = "no shard" if name == pattern else f"no shard {name}"
        raise UserError(f"{pattern}: there is {what} at that place; check the path and the pattern")
    if place.local:
        return [str(path) for path in paths]
    return [place.storage.unstrip_protocol(path) for path in paths]


def locate_embedded(name: str) -> str:
    """`embedded:...` as a path into the package; anything else as it is."""
    if not name.startswith(EMBEDDED):
        return name
    inside = name.removeprefix(EMBEDDED)
    if ".." in Path(inside).parts or Path(inside).is_absolute():
        raise UserError(f"{name}: embedded data lies inside the package; drop `..` and `/`")
    return str(embedded_folder() / inside)


@lru_cache(4096)
def resolve(url: str) -> Place:
    """The storage a URL lives on; raises UserError if no driver for it is installed."""
    try:
        storage, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: no storage driver serves this address ({error})") from error
    protocols = (storage.protocol,) if isinstance(storage.protocol, str) else storage.protocol
    return Place(storage, path, "file" in protocols)


def short_names(urls: tuple[str, ...]) -> tuple[str, ...]:
    """Shards by their path below the deepest folder that all share, without `.tar`.

    Unique within a data set, and the same wherever the data set lies.
    """
    parts = [url.split("/") for url in urls]
    levels = zip(*(part[:-1] for part in parts), strict=False)
    shared = len(list(itertools.takewhile(lambda level: len(set(level)) == 1, levels)))
    return tuple("/".join(part[shared:]).removesuffix(".tar") for part in parts)
