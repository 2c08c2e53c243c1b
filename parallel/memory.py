"""How much memory tensors take, measured from within: allocators of CPUs do not tell."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.pieces import Held, local_part


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that are made within a `with` block and are still there.

    Views share memory and count once; memory that was given up while its tensor lives on, as FSDP does,
    does not count. What no operation returns, such as a kernel's own scratch space, is not seen.

    peak: the most bytes at any moment
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def now(self) -> int:
        """Bytes at this moment."""
        return sum(storage.nbytes() for storage in self._alive)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        inputs = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and (storage := _storage(result)) not in inputs:
                self._alive.add(storage)
        self.peak = max(self.peak, self.now)
        return results


def held_bytes(tensors: Iterable[Held]) -> int:
    """Bytes that this rank has of some tensors, without padding."""
    parts = [local_part(tensor) for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
