"""The manifest: what a checkpoint holds, by tensor and by file, with sizes and checksums.

`manifest.json` is the last file written and the first one read. It carries a checksum of itself,
so that an edited or damaged manifest is refused like any other damaged file.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.errors import UserError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """One file of the checkpoint: size in bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """One box of a tensor: its file, its key there, where in the tensor it begins, its size."""

    file: str
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: global shape, dtype as safetensors names it, and its chunks."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """All that a reader has to know; `layout` and `torch` are for people."""

    version: int
    step: int
    time: str
    torch: str
    layout: str
    state: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write `manifest` into `folder` (not yet synced to disk); the path written."""
    body = json.loads(json.dumps(asdict(manifest), allow_nan=False))  # as it will be read
    path = folder / MANIFEST
    path.write_text(json.dumps({"sha256": _checksum(body), **body}), encoding="utf-8")
    return path


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of one checkpoint; UserError if missing, damaged or of another format."""
    path = checkpoint / MANIFEST
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so {checkpoint} is not a checkpoint.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError:
        raise UserError(f"{path}: not valid JSON; use another checkpoint.") from None
    if not isinstance(body, dict) or body.pop("sha256", None) != _checksum(body):
        raise UserError(f"{path}: does not match its own checksum; use another checkpoint.")
    if body["version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {body['version']} is not {FORMAT_VERSION}, the one this "
            "flowmill reads; use the flowmill that wrote it."
        )
    files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
    tensors = {name: _tensor_entry(entry) for name, entry in body.pop("tensors").items()}
    return Manifest(**body, files=files, tensors=tensors)


def damaged_sizes(checkpoint: Path, manifest: Manifest) -> str | None:
    """What is wrong with the files' presence and sizes, or None; reads no data."""
    for name, entry in manifest.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != entry.size:
            return f"{path} has {size} bytes instead of {entry.size}"
    return None


def damaged_contents(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with the checksums of the files `names`, or None; reads them whole."""
    for name in names:
        path = checkpoint / name
        try:
            found = file_sha256(path)
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"
        if found != manifest.files[name].sha256:
            return f"{path} does not match its checksum"
    return None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _checksum(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _tensor_entry(entry: dict[str, Any]) -> TensorEntry:
    chunks = tuple(
        Chunk(chunk["file"], chunk["key"], tuple(chunk["offsets"]), tuple(chunk["sizes"]))
        for chunk in entry["chunks"]
    )
    return TensorEntry(tuple(entry["shape"]), entry["dtype"], chunks)
