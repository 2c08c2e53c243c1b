"""Numbers about the samples of a shard, worked out once and kept in the user's cache folder.

They are believed for as long as the shard's size and change mark are those they were made for.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.index import look_at, signature_of
from data_pipeline.npy import read_npz
from data_pipeline.order import Int64
from data_pipeline.storage import resolve
from data_pipeline.storing import replaced_whole


def remembered(url: str, what: str, make: Callable[[], Int64]) -> Int64:
    """What `make` makes of the shard at `url` as it is now.

    what: says which numbers these are; others are kept beside them
    """
    signature = f"{signature_of(look_at(url))} {what}"
    stored = _cache_file(url, signature)
    values = _load(stored, signature)
    if values is None:
        values = make()
        # A cache that cannot be written costs the next run another look, no more.
        with contextlib.suppress(OSError):
            _store(stored, values, signature)
    return values


def _cache_file(url: str, signature: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    absolute = str(Path(url).resolve()) if resolve(url).local else url
    name = hashlib.sha256(f"{absolute} {signature}".encode()).hexdigest()[:32]
    return home / "flowmill" / "remembered" / f"{name}.npz"


def _load(stored: Path, signature: str) -> Int64 | None:
    try:
        arrays = read_npz(stored.read_bytes())
        if str(arrays["signature"]) != signature:
            return None
        return np.asarray(arrays["values"], np.int64)
    except (OSError, ValueError, KeyError):
        return None


def _store(stored: Path, values: Int64, signature: str) -> None:
    """Write them whole or not at all, whoever else writes them."""
    with replaced_whole(stored) as path, path.open("wb") as file:
        np.savez_compressed(file, signature=np.array(signature), values=values)
