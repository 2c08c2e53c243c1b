"""The loop: ask for a batch, draw its noise, go forward and backward, clip, step, average, meter.

Components go in, events come out; nobody subclasses it. It does not know which engine moves the model.
"""

import signal
import threading
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from data_pipeline.loader import Loader
from flows.models.family import persistent_buffers
from flows.objectives.objective import Objective
from parallel.clock import Clock
from parallel.engines.engine import Engine
from parallel.pieces import Held
from trainer.checkpoints.commit import committed
from trainer.checkpoints.store import save
from trainer.coupling import coupled
from trainer.ema import Ema
from trainer.recipe import Recipe
from trainer.reporting import Quiet
from trainer.routing import rebalance_routers, sum_routing
from trainer.run_folder import RunFolder, science
from trainer.sampling import sample_over_ranks
from trainer.schedules import learning_rate
from trainer.telemetry import Telemetry

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 2.0
# In a checkpoint's state: the weights of another program, or of a dense network; the run of which the
# experts were placed. They are true of all later checkpoints, too.
ORIGINS = ("imported", "placed")


@dataclass(frozen=True)
class Parts:
    """Everything one rank trains with.

    origin: where the run's first checkpoint came from, where it was not trained here, see `ORIGINS`
    """

    recipe: Recipe
    run: RunFolder
    degrees: str
    engine: Engine
    objective: Objective
    loader: Loader
    ema: Ema
    telemetry: Telemetry
    clock: Clock
    report: Quiet
    origin: Mapping[str, Any] = field(default_factory=dict)


def train(parts: Parts, first: int) -> int:
    """Train from step `first` to the end of the recipe; the number of steps done.

    When any rank is asked to stop by a signal, all save a checkpoint at the same step and return.
    Raises UserError when too many steps in a row had a non-finite gradient.
    """
    recipe, telemetry = parts.recipe, parts.telemetry
    last = recipe.train.steps
    # The run would have gone on from these if they were whole.
    refused = {step for step, _ in committed(parts.run.checkpoints) if step > first}
    with stop_requested() as stop:
        telemetry.restart_clock()
        for done in range(first + 1, last + 1):
            one_step(parts, done - 1, stop.is_set())
            ending = telemetry.stop_agreed or done == last
            if ending or done % recipe.checkpoint.every == 0:
                refused.discard(done)
                checkpoint(parts, done, refused)
            if recipe.sample.every and (done == last or done % recipe.sample.every == 0):
                show_samples(parts, done)
            if ending:
                return done
    return first


def one_step(parts: Parts, step: int, stop: bool) -> None:
    """Optimizer step `step`, counted from 0, of the whole world; the host does not wait for it."""
    recipe, engine, loader, clock = parts.recipe, parts.engine, parts.loader, parts.clock
    batch = next(loader).to(engine.device)
    with clock.phase("couple"):
        batch = coupled(engine, parts.objective, batch, recipe.seed, step)
    microbatches = list(batch.split(recipe.train.microbatch or len(batch)))
    result = engine.forward_backward(
        microbatches, parts.objective, recipe.seed, step, recipe.train.batch
    )
    norm = engine.clip_gradients(recipe.optimizer.clip)
    skip = 1.0 - torch.isfinite(norm).float()
    rate = rate_at(recipe, step)
    engine.step(rate, skip)
    every = recipe.train.trace_experts
    traced = every > 0 and (step + 1) % every == 0
    routing = sum_routing(result, engine.sum_over_data, traced=traced)
    if routing is not None:
        rebalance_routers(engine, routing, skip)
    with clock.phase("average"):
        parts.ema.update(engine.parameters(), skip, step)
    parts.telemetry.push(
        step,
        result,
        norm=norm,
        skip=skip,
        stop=stop,
        bad=loader.bad_samples,
        host={
            "lr": rate,
            "data_wait_seconds": loader.wait_seconds,
            "queue_depth": loader.queue_depth,
            "read_depth": loader.read_depth,
            "redecoded": loader.redecoded,
            "seconds": clock.take(),
        },
        sum_over_data=engine.sum_over_data,
        sum_over_peers=engine.sum_over_peers,
        routing=routing,
    )
    for line in parts.telemetry.lines():
        parts.report.step(line)


def rate_at(recipe: Recipe, step: int) -> float:
    """The learning rate of optimizer step `step`."""
    section = recipe.optimizer
    return learning_rate(
        step,
        lr=section.lr,
        warmup=section.warmup,
        steps=recipe.train.steps,
        schedule=section.schedule,
        final_lr=section.final_lr,
    )


def checkpoint(parts: Parts, done: int, refused: Container[int]) -> None:
    """Commit everything the run needs to go on after `done` steps; its metrics are written first.

    refused: steps of damaged checkpoints, see `retire`
    """
    for line in parts.telemetry.lines(everything=True):
        parts.report.step(line)
    with parts.clock.phase("checkpoint"):
        save(
            parts.run.checkpoints,
            step=done,
            tensors=checkpoint_tensors(parts),
            state={
                "step": done,
                "layout": parts.degrees,
                "science": science(parts.recipe),
                "loader": parts.loader.state_dict(),
                "telemetry": parts.telemetry.state_dict(),
                **parts.origin,
            },
            keep=parts.recipe.checkpoint.keep,
            refused=refused,
        )
    parts.report.checkpoint(done)
    if parts.telemetry.experts.table is not None:
        parts.report.experts(parts.telemetry.experts.table)
    parts.telemetry.restart_clock()


def checkpoint_tensors(parts: Parts) -> dict[str, Held]:
    """Canonical name -> tensor, the same names under any layout; loading writes in place."""
    buffers = persistent_buffers(parts.engine.outline())
    return {
        **{f"buffer.{name}": value for name, value in buffers.items()},
        **{f"model.{name}": value.detach() for name, value in parts.engine.parameters().items()},
        **{f"optimizer.{name}": value for name, value in parts.engine.optimizer_tensors().items()},
        **{f"ema.{name}": value for name, value in parts.ema.tensors().items()},
    }


def show_samples(parts: Parts, done: int) -> None:
    """A grid from the averaged weights: drawn by all ranks, shown by the first."""
    with parts.clock.phase("sample"):
        drawn = sample_over_ranks(parts.engine, parts.ema, parts.recipe)
    parts.report.samples(done, drawn.images, drawn.labels)
    parts.telemetry.restart_clock()


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGTERM, SIGINT and SIGUSR1 set; one that comes again later acts as it did before.

    One request may arrive twice: from the terminal or the scheduler, and passed on by the parent.
    """
    event = threading.Event()
    asked = 0.0
    before = {kind: signal.getsignal(kind) for kind in STOP_SIGNALS}

    def ask(number: int, _frame: object) -> None:
        nonlocal asked
        if not event.is_set():
            asked = time.monotonic()
            event.set()
        elif time.monotonic() - asked > SAME_REQUEST_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for kind in STOP_SIGNALS:
        signal.signal(kind, ask)
    try:
        yield event
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
