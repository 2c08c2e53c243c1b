"""Files on any storage that appear whole or not at all."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.storage import resolve
from flows.errors import UserError

CHUNK = 4 << 20
SHOWN = 200  # characters of what a library says


def reason(error: Exception) -> str:
    """What a library says is wrong, cut to a part of one sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].strip(" .")[:SHOWN]


@contextmanager
def written_whole(url: str) -> Iterator[Path]:
    """A local file to write, which is at `url` when the block ends well.

    Raises UserError if the storage refuses it.
    """
    place = resolve(url)
    target = Path(place.path)
    temporary: Path | None = None
    try:
        if place.local:
            target.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that moving it there is one step.
        folder = target.parent if place.local else None
        handle, name = tempfile.mkstemp(dir=folder, prefix=f".{target.name}", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if place.local:
            temporary.chmod(0o644)
            temporary.replace(target)
        else:
            place.storage.put_file(name, place.path)
    except OSError as error:
        raise UserError(
            f"{url}: cannot be written ({reason(error)}); check space and rights"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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
    except OSError as error:
        raise UserError(
            f"{url}: cannot be read ({reason(error)}); check that it is still there"
        ) from error
    return digest.hexdigest()
