"""Data parallelism: FSDP2 and HSDP cut the model over ranks, DDP keeps whole copies.

Each block is gathered on its own, so at any time a rank holds its shard of everything and one whole
block (two while the next is fetched). On a 2-D mesh (HSDP) gathers stay within `shard`, and
gradients are averaged over `replicate` after they have been cut.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from flows.models.family import parameter_count


def shard_model(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    policy: MixedPrecisionPolicy,
    reshard_after_forward: bool,
    offload: bool,
    apart: Sequence[nn.Module] = (),
    apart_mesh: DeviceMesh | None = None,
    uncut: set[nn.Parameter] | None = None,
) -> None:
    """Cut each block, then the rest of the model, in place; parameters become DTensors.

    mesh: one axis, along which parameters are cut, or two: along the first lie copies (HSDP)
    apart, apart_mesh: modules within blocks that are cut over other ranks
    uncut: parameters that stay whole, and are none of FSDP's business
    offload: shards lie on the host and are copied to the device as they are gathered; gradients go back
    """
    quiet()
    # Pinned memory is for copies to a device that do not wait.
    where = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()

    def cut(module: nn.Module, reshard: bool, over: DeviceMesh = mesh) -> None:
        fully_shard(
            module,
            mesh=over,
            mp_policy=policy,
            reshard_after_forward=reshard,
            offload_policy=where,
            ignored_params=uncut,
        )

    for module in apart:
        assert apart_mesh is not None
        cut(module, reshard_after_forward, apart_mesh)
    for block in blocks:
        cut(block, reshard_after_forward)
    # The backward begins with the rest, so dropping it after the forward would be for nothing.
    cut(model, False)


def quiet() -> None:
    """FSDP2 warns of in-place operations on outputs that are views; outputs are only read here."""
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def replicate_model(model: nn.Module, mesh: DeviceMesh) -> DistributedDataParallel:
    """Average gradients over the one axis of `mesh`; every rank has drawn the same weights already."""
    return DistributedDataParallel(
        model,
        process_group=mesh.get_group(),
        init_sync=False,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )


def release_gathered(model: nn.Module) -> None:
    """Drop gathered copies, so that the next forward gathers the shards as they are then."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered_bytes(model: nn.Module, item_size: int, reshard_after_forward: bool) -> int:
    """Bytes of whole weights that a rank has for a while: the root's, and of two blocks, one of which is on
    its way; of all blocks where they stay until the backward. 0 for a model that is not cut.

    item_size: bytes of a number as it is gathered
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not parts:
        return 0
    # Units within blocks, such as experts, are there while their block is.
    nested = {
        id(inner)
        for part in parts[1:]
        for inner in cast(nn.Module, part).modules()
        if inner is not part
    }
    outermost = [part for part in parts[1:] if id(part) not in nested]
    blocks = sorted((parameter_count(cast(nn.Module, p)) for p in outermost), reverse=True)
    there = blocks[:2] if reshard_after_forward else blocks
    return item_size * (parameter_count(model) - sum(blocks) + sum(there))


@contextmanager
def held_whole(model: nn.Module, reshard_after_forward: bool) -> Iterator[None]:
    """Within, every rank holds all of `model`, so that its parts can be called in any order, alone.

    reshard_after_forward: as the model was cut with; in force again at the end
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(
                reshard_after_forward and part is not model, recurse=False
            )
            part.reshard()
