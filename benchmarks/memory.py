"""What a rank holds of a recipe's model on any number of ranks, found out without the ranks or the memory.

The model is laid over a process group that only counts ranks, on the meta device, so what a rank holds is
read from the very tensors that training would have. What a step keeps for its backward is found by a
forward of one microbatch whose tensors have shapes and no memory.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from flows.batch import Batch
from flows.errors import UserError
from flows.models.family import Architecture, parameter_count
from flows.randomness import Draw
from parallel.activation import Recompute
from parallel.fsdp import gathered_bytes
from parallel.memory import LiveBytes, held_bytes
from parallel.mesh import AXES, Layout, build_mesh
from parallel.parallelize import FlowModel, ParallelModel, lay_out
from parallel.precision import computing
from trainer.assembly import build_objective, check_layout, model_architecture
from trainer.engines import accumulates, place
from trainer.recipe import Recipe


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the first rank, which holds as much as any.

    whole: parameters of the model, a number each
    offloaded: what lies there between steps is on the host, and no part of the total
    gradients: of the shards; of all that the rank computes with where microbatches add up
    gathered: weights of other ranks that are there while blocks compute
    activations: what the forward of a microbatch keeps for its backward
    recomputed: what one block keeps while it is computed again, the mean of the blocks that are
    """

    ranks: int
    layout: str
    whole: int
    offloaded: bool
    parameters: int
    gradients: int
    optimizer: int
    averages: int
    gathered: int
    activations: int
    recomputed: int

    @property
    def total(self) -> int:
        found = asdict(self)
        return sum(found[name] for name in (DEVICE if self.offloaded else HELD))


DEVICE = ("gathered", "activations", "recomputed")
HELD = ("parameters", "gradients", "optimizer", "averages", *DEVICE)


def measure(recipe: Recipe, ranks: int) -> RankMemory:
    """Raises UserError for a layout that cannot be, and for other engines than the native one."""
    if recipe.parallel.engine != "native":
        raise UserError(
            f"parallel.engine = {recipe.parallel.engine} lays a model out in its own way, which is not known "
            "beforehand; use parallel.engine=native."
        )
    placement = place(recipe, ranks)
    architecture, layout = model_architecture(recipe), placement.layout
    if layout.pp > 1:
        raise UserError(
            f"parallel.pp = {layout.pp} gives every rank another part of the model, of which this benchmark "
            "knows nothing; use parallel.pp=1."
        )
    check_layout(recipe, layout, architecture)
    with pretended_ranks(ranks):
        mesh = build_mesh(layout, torch.device("cpu"))
        with torch.device("meta"):
            model = architecture.build()
        whole = parameter_count(model)
        held = _laid_out(recipe, model, mesh, layout, recipe.train.recompute)
        parameters = held_bytes(held.held.values())
        gradients = parameters
        if accumulates(recipe, layout):
            gradients = 4 * sum(parameter.numel() for parameter in held.parameters.values())
        wide = 2 if recipe.train.precision == "bf16" else 4
        gathered = gathered_bytes(held.bare, wide, recipe.parallel.reshard_after_forward)
        activations, recomputed = _activations(recipe, architecture, mesh, layout)
    return RankMemory(
        ranks=ranks,
        layout=" x ".join(
            f"{axis} {n}" for axis in (*AXES, "ep") if (n := getattr(layout, axis)) > 1
        ),
        whole=whole,
        offloaded=recipe.parallel.offload,
        parameters=parameters,
        gradients=gradients,
        optimizer=2 * parameters,
        averages=len(recipe.train.ema) * parameters,
        gathered=gathered,
        activations=activations,
        recomputed=recomputed,
    )


@contextmanager
def pretended_ranks(count: int) -> Iterator[None]:
    """A process group of so many ranks of which this is the first, and whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _laid_out(
    recipe: Recipe, model: nn.Module, mesh: DeviceMesh, layout: Layout, recompute: Recompute
) -> ParallelModel:
    return lay_out(
        model,
        mesh,
        layout,
        precision=recipe.train.precision,
        checkpoint_activations=recompute,
        compile=False,
        reshard_after_forward=recipe.parallel.reshard_after_forward,
        offload=False,
    )


def _activations(
    recipe: Recipe, architecture: Architecture, mesh: DeviceMesh, layout: Layout
) -> tuple[int, int]:
    """What all of a microbatch's forward leaves, and what one block adds while it is recomputed."""
    train = recipe.train
    kept = _kept(recipe, architecture, mesh, layout, train.recompute)
    if not train.recompute.every:
        return kept, 0
    everything = _kept(recipe, architecture, mesh, layout, Recompute(0))
    with torch.device("meta"):
        blocks = len(cast(FlowModel, architecture.build()).blocks)
    return kept, (everything - kept) // -(-blocks // train.recompute.every)


def _kept(
    recipe: Recipe,
    architecture: Architecture,
    mesh: DeviceMesh,
    layout: Layout,
    recompute: Recompute,
) -> int:
    """Bytes that a forward of one microbatch leaves, of a model whose weights are all there."""
    objective, cpu = build_objective(recipe), torch.device("cpu")
    # Where loads are balanced, as many tokens come to a rank's experts as leave for those of others.
    whole = replace(layout, strategy="none", ep=1)
    with FakeTensorMode(), cpu, warnings.catch_warnings():
        # Copying a model whose tensors have no memory asks where their memory is.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        network = _laid_out(recipe, architecture.build(), mesh, whole, recompute).bare
        if recipe.train.precision == "bf16" and layout.strategy in ("fsdp", "hsdp"):
            for parameter in network.parameters():  # as FSDP gathers them
                parameter.data = parameter.data.bfloat16()
        batch = _microbatch(recipe, recipe.train.batch // layout.data_size)
        prepared = objective.prepare(batch, Draw(recipe.seed, 0, batch.position))
        with LiveBytes() as live, computing(recipe.train.precision, cpu):
            outputs = network(**prepared.inputs)
            kept: int = live.now
        del outputs
    return kept


def _microbatch(recipe: Recipe, local: int) -> Batch:
    data, count = recipe.data, min(recipe.train.microbatch or local, local)
    extras = {}
    if data.text is not None:
        extras["text"] = torch.zeros(count, data.text.tokens, data.text.width)
    return Batch(
        torch.zeros(count, data.channels, data.image_size, data.image_size),
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count),
        extras,
    )
