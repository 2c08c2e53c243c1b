"""The planners of torch.distributed.checkpoint, taught about `FlatPiece`s and `Slice`s.

Either is saved and loaded as the boxes of the whole tensor that it is made of, so a file does not
tell whether a box was a DTensor's shard or a part of a piece, and either is read from the other's.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.pieces import FlatPiece, Held, Slice


class SavePlanner(DefaultSavePlanner):
    """Plans a save of what `planned` made."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        return held.box(index) if isinstance(held, Boxes) else super().lookup_object(index)


class LoadPlanner(DefaultLoadPlanner):
    """Plans a load into what `planned` made."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Without the default's look for meta tensors, in which `Boxes` would be lost."""
        self.state_dict, self.metadata = state_dict, metadata
        self.is_coordinator = is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held = self.state_dict[index.fqn]
        return held.box(index) if isinstance(held, Boxes) else super().lookup_tensor(index)


def planned(tensors: Mapping[str, Held]) -> dict[str, Any]:
    """`tensors` as the planners take them."""
    return {
        name: Boxes(held) if isinstance(held, FlatPiece | Slice) else held
        for name, held in tensors.items()
    }


class Boxes:
    """A piece or a slice, seen as boxes. The dunder methods are those that the planners ask for."""

    def __init__(self, piece: FlatPiece | Slice) -> None:
        self._shape, self._properties = piece.shape, TensorProperties(dtype=piece.dtype)
        self._boxes = {torch.Size(offsets): box for offsets, box in piece.boxes()}

    def box(self, index: MetadataIndex) -> Tensor:
        """The box that begins at `index`, a view of the piece's memory."""
        assert index.offset is not None
        return self._boxes[index.offset]

    def size(self) -> torch.Size:
        """Of the whole tensor."""
        return self._shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, box.shape) for offsets, box in self._boxes.items()]

    def __create_write_items__(self, name: str, _held: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, self._properties, self._shape),
            )
            for chunk in self.__create_chunk_list__()
        ]
