"""Tensors to and from safetensors files, one file a rank, as torch.distributed.checkpoint plans.

The plans decide who writes what (each chunk once, replicas shared out by size) and who reads
which part of which chunk. Here the bytes move: a rank never holds more than one chunk besides its
own tensors, nothing is pickled, and a file's checksum is computed while it is written.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainer.checkpoints.manifest import Chunk, FileEntry, Manifest, TensorEntry

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


# What all ranks wrote: canonical name -> tensor, file name -> file.
Commit = Callable[[dict[str, TensorEntry], dict[str, FileEntry]], None]


@dataclass(frozen=True)
class Written:
    """What one rank tells about one chunk it wrote, and about the file the chunk lies in."""

    name: str
    chunk: Chunk
    file: FileEntry


class ShardWriter(StorageWriter):
    """Writes each rank's chunks into `folder/shard-<rank>.safetensors`.

    begin: called on rank 0 before any rank writes
    commit: called on rank 0 with what all ranks wrote, after all of them succeeded
    """

    def __init__(self, folder: Path, begin: Callable[[], None], commit: Commit) -> None:
        self.folder = folder
        self.begin = begin
        self.commit = commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(
        self,
        is_coordinator: bool,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        if is_coordinator:
            self.begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            replace(plan, storage_data=f"shard-{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        path = self.folder / str(plan.storage_data)
        # A rank may own nothing of a tensor that has fewer rows than there are ranks.
        items = [item for item in plan.items if _numel(item) > 0]
        results: Future[list[WriteResult]] = Future()
        try:
            results.set_result(write_shard(path, items, planner) if items else [])
        except OSError as error:
            # Errors of write(2) do not name their file, and this one is reported by another rank.
            raise OSError(error.errno, error.strerror, str(path)) from error
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written: list[Written] = [result.storage_data for rank in results for result in rank]
        chunks: dict[str, list[Chunk]] = {name: [] for name in metadata.state_dict_metadata}
        for one in written:
            chunks[one.name].append(one.chunk)
        tensors = {
            name: TensorEntry(tuple(tensor.size), DTYPES[tensor.properties.dtype], tuple(boxes))
            for (name, boxes), tensor in zip(
                chunks.items(), metadata.state_dict_metadata.values(), strict=True
            )
            if isinstance(tensor, TensorStorageMetadata)
        }
        self.commit(tensors, {one.chunk.file: one.file for one in written})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, Path)


def write_shard(path: Path, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
    """Write `items` as one safetensors file, synced to disk; what was written.

    The header is known before any data, so tensors go one by one: device -> host -> checksum ->
    file.
    """
    items = sorted(items, key=lambda item: (-_dtype(item).itemsize, _key(item)))
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as stream:
        _write(stream, digest, _header(items))
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            host = tensor.detach().cpu().contiguous()
            _write(stream, digest, host.reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(stream.fileno())
        entry = FileEntry(stream.tell(), digest.hexdigest())
    return [_result(item, path, entry) for item in items]


class ShardReader(StorageReader):
    """Reads chunks of the checkpoint in `folder`, only the parts that this rank's tensors cover."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.chunks = {
            MetadataIndex(name, chunk.offsets): chunk
            for name, entry in manifest.tensors.items()
            for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self) -> Metadata:
        return Metadata(
            {name: _storage_metadata(entry) for name, entry in self.manifest.tensors.items()}
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """The manifest said everything."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.chunks[item.storage_index].file, []).append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    chunk = file.get_slice(self.chunks[item.storage_index].key)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(chunk[_slices(item)])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, Path)


def _write(stream: BinaryIO, digest: Any, data: bytes | memoryview) -> None:
    """Write all of `data`: a raw write may take less than it was given (2 GiB at most on Linux)."""
    digest.update(data)
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def _header(items: list[WriteItem]) -> bytes:
    """The safetensors header of `items`, with the place of each chunk in its tensor."""
    header: dict[str, Any] = {}
    places: dict[str, Any] = {}
    end = 0
    for item in items:
        begin, end = end, end + _numel(item) * _dtype(item).itemsize
        header[_key(item)] = {
            "dtype": DTYPES[_dtype(item)],
            "shape": _sizes(item),
            "data_offsets": [begin, end],
        }
        places[_key(item)] = {
            "name": item.index.fqn,
            "shape": list(_data(item).size),
            "offsets": _offsets(item),
        }
    header["__metadata__"] = {"format": "pt", "chunks": json.dumps(places)}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)  # data begins aligned
    return len(text).to_bytes(8, "little") + text


def _result(item: WriteItem, path: Path, file: FileEntry) -> WriteResult:
    chunk = Chunk(path.name, _key(item), tuple(_offsets(item)), tuple(_sizes(item)))
    size = _numel(item) * _dtype(item).itemsize
    return WriteResult(item.index, size, Written(item.index.fqn, chunk, file))


def _storage_metadata(entry: TensorEntry) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=TORCH_DTYPES[entry.dtype]),
        size=torch.Size(entry.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in entry.chunks
        ],
    )


def _slices(item: ReadItem) -> Any:
    if not item.lengths:
        return ...  # a tensor without dimensions
    return tuple(
        slice(begin, begin + length)
        for begin, length in zip(item.storage_offsets, item.lengths, strict=True)
    )


def _data(item: WriteItem) -> Any:
    assert item.tensor_data is not None
    return item.tensor_data


def _dtype(item: WriteItem) -> torch.dtype:
    dtype: torch.dtype = _data(item).properties.dtype
    return dtype


def _sizes(item: WriteItem) -> list[int]:
    return list(_data(item).chunk.sizes)


def _offsets(item: WriteItem) -> list[int]:
    return list(_data(item).chunk.offsets)


def _numel(item: WriteItem) -> int:
    return torch.Size(_sizes(item)).numel()


def _key(item: WriteItem) -> str:
    """The tensor's name, and where a chunk begins: two chunks of it may share a file."""
    if _sizes(item) == list(_data(item).size):
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, _offsets(item)))}"
