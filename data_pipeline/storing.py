"""Files on any storage that appear whole or not at all."""

import fnmatch
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from data_pipeline.storage import call, describe, passing_errors, patiently, remedy, resolve
from flows.errors import UserError

T = TypeVar("T")

CHUNK = 4 << 20
SHOWN = 200  # characters of what a library says


def reason(error: BaseException) -> str:
    """What a library says is wrong, cut to a part of one sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].strip(" .")[:SHOWN]


@contextmanager
def written_whole(url: str) -> Iterator[Path]:
    """A local file to write, which is at `url` when the block ends well.

    Raises UserError if the storage refuses it.
    """
    place = resolve(url)
    try:
        if place.local:
            with replaced_whole(Path(place.path)) as file:
                yield file
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "whole"
                yield file
                # The driver itself has no time limit: a large file takes as long as it takes.
                patiently(lambda: place.storage.put_file(str(file), place.path))
    except OSError as error:
        raise UserError(
            f"{url}: cannot be written ({reason(error)}); {remedy(error, 'check space and rights')}"
        ) from error


@contextmanager
def replaced_whole(target: Path) -> Iterator[Path]:
    """A file to write, which is at `target` when the block ends well, and nowhere when it does not.

    Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that moving it there is one step.
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
        Path(name).chmod(0o644)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(url: str, text: str) -> None:
    with written_whole(url) as file:
        file.write_text(text, encoding="utf-8")


def sha256_of(url: str) -> str:
    """Of the whole file, in hexadecimal; raises UserError if it cannot be read."""
    place = resolve(url)
    digest = hashlib.sha256()
    try:
        with place.storage.open(place.path, "rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    except passing_errors() as error:
        raise UserError(
            f"{url}: cannot be read ({describe(error)}); check that it is still there"
        ) from error
    return digest.hexdigest()


def read_if_there(url: str) -> bytes | None:
    """A small file, or None; raises UserError if the storage does not answer."""
    place = resolve(url)
    return _if_there(url, lambda: bytes(call(place.storage, "cat_file", place.path)))


def size_if_there(url: str) -> int | None:
    """Bytes of a file, or None; raises UserError if the storage does not answer."""
    place = resolve(url)
    place.storage.invalidate_cache()
    return _if_there(url, lambda: int(call(place.storage, "info", place.path)["size"]))


def remove_if_there(url: str) -> None:
    """Raises UserError if the storage refuses it."""
    place = resolve(url)
    if size_if_there(url) is not None:
        _if_there(url, lambda: call(place.storage, "rm_file", place.path))


def names_in(folder: str, pattern: str) -> list[str]:
    """Names of the files in a folder that fit a pattern; none where there is no folder.

    Raises UserError if the storage does not answer.
    """
    place = resolve(folder)
    place.storage.invalidate_cache()
    found = _if_there(folder, lambda: call(place.storage, "ls", place.path, detail=False)) or []
    # Not by the storage's own patterns: the folder's name may look like one.
    names = [str(path).rpartition("/")[2] for path in found]
    return sorted(fnmatch.filter(names, pattern))


def same_file(one: str, other: str) -> bool:
    """Whether two addresses lead to the same place."""
    places = resolve(one), resolve(other)
    if all(place.local for place in places):
        return Path(places[0].path).resolve() == Path(places[1].path).resolve()
    return places[0].storage.protocol == places[1].storage.protocol and (
        places[0].path == places[1].path
    )


def _if_there(url: str, request: Callable[[], T]) -> T | None:
    try:
        return patiently(request)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{url}: cannot be reached ({describe(error)}); {remedy(error, 'check address and rights')}"
        ) from error
