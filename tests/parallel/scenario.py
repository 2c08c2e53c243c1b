"""One small training run, told twice: by a plain loop on one device, by the engine on any layout.

The network's sizes are chosen to be awkward: the class table has 6 rows and the last layer 9, so
four ranks hold unequal pieces and some ranks hold nothing.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.batch import Batch
from flows.initialise import initialise
from flows.models.chain import Chained
from flows.models.dit import DiT, DiTConfig
from flows.objectives.flow_matching import FlowMatching
from flows.paths import path_named
from flows.randomness import Draw
from flows.times import TimeDistribution
from parallel.activation import Recompute
from parallel.clock import Clock
from parallel.engines import accelerate, deepspeed, deepspeed_config, native, pipelined
from parallel.engines.deepspeed import DeepSpeedEngine
from parallel.engines.engine import Engine, Start, StepResult
from parallel.engines.native import NativeEngine
from parallel.engines.pipelined import PipelinedEngine
from parallel.execution import Execution
from parallel.mesh import Layout, build_mesh
from parallel.pieces import FlatPiece, Held, whole_tensor
from parallel.pipeline.catalog import Words, make_schedule

SEED = 11
GLOBAL_BATCH = 8
STEPS = 10
LEARNING_RATE = 5e-3
MAX_NORM = 0.5
CONFIG = DiTConfig(
    image_size=9, channels=1, classes=5, patch=3, width=20, depth=3, heads=2, learn_sigma=False
)
CPU = torch.device("cpu")
PLAIN = Execution("fp32", Recompute(0), compile=False, reshard_after_forward=True, offload=False)
Network = Callable[[], nn.Module]  # on the meta device


@dataclass(frozen=True)
class Curve:
    """What a run left: loss and gradient norm of each step, final weights by canonical name."""

    losses: Tensor
    norms: Tensor
    weights: dict[str, Tensor]

    def plain(self) -> dict[str, Any]:
        return {"losses": self.losses, "norms": self.norms, "weights": self.weights}


def objective() -> FlowMatching:
    return FlowMatching(
        path=path_named("linear"),
        prediction="velocity",
        weighting="none",
        label_drop=0.2,
        null_label=CONFIG.classes,
        time=TimeDistribution("uniform", mean=0.0, std=1.0, shift=1.0),
    )


def global_batch(step: int) -> Batch:
    """New images at every step, with structure that a network can learn."""
    generator = torch.Generator().manual_seed(1000 + step)
    label = torch.randint(CONFIG.classes, (GLOBAL_BATCH,), generator=generator)
    image = (
        torch.rand(GLOBAL_BATCH, 1, 9, 9, generator=generator)
        - 0.5
        + label[:, None, None, None] / 5
    )
    return Batch(image, label, torch.arange(GLOBAL_BATCH) + step * GLOBAL_BATCH)


def share(batch: Batch, rank: int, size: int) -> Batch:
    count = GLOBAL_BATCH // size
    return list(batch.split(count))[rank]


def adamw(parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [p for _, p in parameters], betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )


def single_device_model() -> DiT:
    model = DiT(CONFIG)
    initialise(model, SEED)
    return model


def first_weights() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in single_device_model().named_parameters()}


def plain_loop(steps: int = STEPS) -> Curve:
    """Nothing of ours but the model and the objective; PyTorch's own unfused AdamW and clipping."""
    model, loss_of = single_device_model(), objective()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, foreach=False
    )
    losses, norms = [], []
    for step in range(steps):
        batch = global_batch(step)
        prepared = loss_of.prepare(batch, Draw(SEED, step, batch.position))
        loss = loss_of.loss(model(**prepared.inputs), prepared.targets).mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Curve(torch.stack(losses), torch.stack(norms), weights)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return DiT(CONFIG)


def start(seed: int = SEED) -> Start:
    return Start(CPU, seed, adamw, Clock(CPU))


def build(
    layout: Layout,
    *,
    network: Network = on_meta,
    precision: Any = "fp32",
    checkpoint_activations: int = 0,
    compile: bool = False,
    reshard_after_forward: bool = True,
    offload: bool = False,
) -> NativeEngine:
    return native.build(
        network(),
        layout,
        build_mesh(layout, CPU),
        Execution(
            precision, Recompute(checkpoint_activations), compile, reshard_after_forward, offload
        ),
        start(),
    )


def build_staged(
    layout: Layout, schedule: str, microbatch: int, *, network: Network = on_meta
) -> PipelinedEngine:
    """The layers over ranks, as if all had as much to do."""
    number = GLOBAL_BATCH // layout.data_size // microbatch
    model = network()
    return pipelined.build(
        model,
        layout,
        build_mesh(layout, CPU),
        make_schedule(
            schedule, layout.pp, number, None, Words("schedule", "pp", "batch", "chunks")
        ),
        [1.0] * len(cast(Chained, model).chain().links),
        PLAIN,
        start(),
    )


def build_zero(
    stage: Any,
    *,
    network: Network = on_meta,
    precision: Any = "fp32",
    checkpoint_activations: int = 0,
    microbatch: int = GLOBAL_BATCH,
    offload: bool = False,
    json: dict[str, Any] | None = None,
) -> DeepSpeedEngine:
    """DeepSpeed on all ranks, each with its share of the batch in microbatches."""
    return deepspeed.build(
        network(),
        zero_config(stage, precision, microbatch, offload, json or {}),
        replace(PLAIN, precision=precision, recompute=Recompute(checkpoint_activations)),
        start(),
    )


def zero_config(
    stage: Any, precision: Any, microbatch: int, offload: bool, json: dict[str, Any]
) -> dict[str, Any]:
    local = GLOBAL_BATCH // dist.get_world_size()
    return deepspeed_config.generate(
        json,
        "a test",
        stage=stage,
        precision=precision,
        batch=GLOBAL_BATCH,
        microbatch=min(microbatch, local),
        accumulate=-(-local // min(microbatch, local)),
        max_norm=MAX_NORM,
        offload_optimizer=offload,
        offload_parameters=offload and stage == 3,
    )


def build_accelerated(
    kind: Any,
    *,
    network: Network = on_meta,
    checkpoint_activations: int = 0,
    reshard_after_forward: bool = True,
    environment: dict[str, str] | None = None,
) -> Engine:
    """Accelerate, which is one for a process and has to forget the one before.

    environment: what `accelerate launch` would set; DeepSpeed is of stage 2
    """
    state = import_module("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    os.environ.update(environment or {})
    return accelerate.build(
        network(),
        kind,
        zero_config(2, "fp32", GLOBAL_BATCH, False, {}) if kind == "deepspeed" else None,
        replace(
            PLAIN,
            recompute=Recompute(checkpoint_activations),
            reshard_after_forward=reshard_after_forward,
        ),
        start(),
    )


def forward_backward(engine: Engine, step: int, microbatch: int = GLOBAL_BATCH) -> StepResult:
    """What this rank saw; the gradients are left in place."""
    mine = share(global_batch(step), engine.data_rank, engine.data_size).to(engine.device)
    parts = list(mine.split(microbatch))
    return engine.forward_backward(parts, objective(), SEED, step, GLOBAL_BATCH)


def backward(engine: Engine, step: int, microbatch: int = GLOBAL_BATCH) -> Tensor:
    """() loss over all ranks; the gradients are left in place."""
    result = forward_backward(engine, step, microbatch)
    return engine.sum_over_data(result.loss.sum()) / GLOBAL_BATCH


def train(engine: Engine, steps: int = STEPS, microbatch: int = GLOBAL_BATCH) -> Curve:
    losses, norms = [], []
    for step in range(steps):
        losses.append(backward(engine, step, microbatch))
        norms.append(engine.clip_gradients(MAX_NORM))
        engine.step(LEARNING_RATE, torch.zeros((), device=engine.device))
    return Curve(torch.stack(losses), torch.stack(norms), whole(engine.parameters()))


def whole(tensors: Mapping[str, Held]) -> dict[str, Tensor]:
    """Copies of whole tensors; a collective where they are cut."""
    return {name: _whole(held).detach().clone() for name, held in tensors.items()}


def _whole(held: Held) -> Tensor:
    if isinstance(held, FlatPiece):
        line = torch.zeros(held.shape.numel(), device=held.local.device)
        line[held.start : held.start + len(held.local)] = held.local
        dist.all_reduce(line)
        return line.view(held.shape)
    return whole_tensor(held)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest relative difference."""
    return float(((ours - theirs).abs() / theirs.abs()).max())


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative L2 distance of all weights together."""
    assert ours.keys() == theirs.keys()
    names = sorted(ours)
    a, b = (torch.cat([w[n].flatten().double() for n in names]) for w in (ours, theirs))
    return float((a - b).norm() / b.norm())


def relative_norm(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance of two tensors."""
    return float((ours - theirs).norm() / theirs.norm())
