"""Looking into checkpoints, tensor by tensor, as one process: what is in one, how two differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flows.errors import UserError
from trainer.checkpoints.commit import committed
from trainer.checkpoints.manifest import MANIFEST, Manifest, damaged_sizes, read_manifest
from trainer.checkpoints.shards import TORCH_DTYPES


def checkpoint_in(target: Path, step: int | None = None) -> Path:
    """The checkpoint that `target` is, or the one of `step` (None: the newest) of the run it is.

    Raises UserError if there is none.
    """
    if (target / MANIFEST).is_file() or target.name.startswith("step-"):
        return target
    for folder in (target / "checkpoints", target):
        if found := committed(folder):
            named = dict(found)
            if step is None:
                return found[-1][1]
            if step not in named:
                there = ", ".join(str(at) for at in named)
                raise UserError(f"{target} has no checkpoint of step {step}; there is {there}.")
            return named[step]
    what = "has no checkpoints" if target.exists() else "no such folder"
    raise UserError(f"{target}: {what}; name a run folder, or a checkpoint in one.")


def whole_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose files are there; UserError where they are not."""
    manifest = read_manifest(checkpoint)
    if (damage := damaged_sizes(checkpoint, manifest)) is not None:
        raise UserError(f"{damage}; use another checkpoint.")
    return manifest


def read_tensor(checkpoint: Path, manifest: Manifest, name: str) -> Tensor:
    """One whole tensor, whatever boxes it was written in. Raises UserError for a damaged file."""
    entry = manifest.tensors[name]
    value = torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype])
    for chunk in entry.chunks:
        path = checkpoint / chunk.file
        try:
            with safe_open(path, framework="pt") as file:
                box = file.get_tensor(chunk.key)
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({error}); use another checkpoint.") from None
        place = tuple(
            slice(begin, begin + size)
            for begin, size in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        value[place] = box
    return value


def read_tensors(checkpoint: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by the names that `names` gives them, name in the checkpoint -> name in the result."""
    manifest = whole_manifest(checkpoint)
    return {own: read_tensor(checkpoint, manifest, name) for name, own in names.items()}


@dataclass(frozen=True)
class Difference:
    """One tensor that two checkpoints do not both have, bit by bit.

    what: in words; largest: largest absolute difference; relative: norm of the difference over the
    norm of the first; None where the two cannot be subtracted
    """

    name: str
    what: str
    largest: float | None = None
    relative: float | None = None


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """What is different in two checkpoints, by the names of the tensors. Reads them one by one."""
    ours, theirs = whole_manifest(first), whole_manifest(second)
    for name in sorted(ours.tensors.keys() | theirs.tensors.keys()):
        here, there = ours.tensors.get(name), theirs.tensors.get(name)
        if here is None or there is None:
            yield Difference(name, "in the second alone" if here is None else "in the first alone")
        elif (here.shape, here.dtype) != (there.shape, there.dtype):
            kinds = f"{here.dtype} {list(here.shape)}", f"{there.dtype} {list(there.shape)}"
            yield Difference(name, " and ".join(kinds))
        else:
            a, b = read_tensor(first, ours, name), read_tensor(second, theirs, name)
            if not torch.equal(_bytes(a), _bytes(b)):
                yield _values(name, a.double(), b.double())


def _bytes(value: Tensor) -> Tensor:
    """As they lie in memory: not-a-number equals itself there."""
    return value.reshape(-1).view(torch.uint8)


def _values(name: str, a: Tensor, b: Tensor) -> Difference:
    apart = a - b
    largest, relative = float(apart.abs().max()), float(apart.norm() / a.norm())
    return Difference(name, "other values", largest, relative)
