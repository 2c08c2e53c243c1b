"""Every schedule on real ranks: losses and gradients are those of one rank."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import schedules

from parallel.pipeline.catalog import NAMES, Words, make_schedule
from parallel.pipeline.runtime import Runtime, silence_schedules
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks

WORDS = Words("schedule", "ranks", "microbatches", "chunks")
CPU = torch.device("cpu")
LAYERS, WIDTH, BATCH, STEPS = 8, 12, 16, 2
# Of sums over microbatches in another order, float32.
TOLERANCE = 1e-5


class Layer(nn.Module):
    """Residual, with a condition that is not part of the stream: as a block with adaptive norms."""

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.modulation = nn.Linear(4, 2 * WIDTH)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.1)

    def forward(self, x: Tensor, total: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """A running total travels with the stream, as the log-determinant of a flow does."""
        scale, gate = self.modulation(condition).chunk(2, dim=-1)
        change = gate * self.down(torch.tanh(self.up(self.norm(x) * (1 + scale))))
        return x + change, total + change.square().mean(dim=1)


class Part(nn.Module):
    """Some layers in a row."""

    def __init__(self, numbers: range) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Layer(number) for number in numbers})

    def forward(self, x: Tensor, total: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers.values():
            x, total = layer(x, total, condition)
        return x, total


def loss_of(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    x, total = output
    return ((x - target).square().mean(dim=1) + 0.1 * total).sum() / BATCH


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    shapes = ((BATCH, WIDTH), (BATCH, 4), (BATCH, WIDTH))
    x, condition, target = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, condition, target


def one_rank() -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of each step, the weights moving a little in between."""
    model = Part(range(LAYERS))
    found = []
    for step in range(STEPS):
        x, condition, target = batch(step)
        model.zero_grad()
        loss = loss_of(model(x, torch.zeros(BATCH), condition), target)
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
        _move(model)
    return found


def _move(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= 0.1 * parameter.grad


def pipelined(ranks: Ranks, names: list[str]) -> dict[str, Any]:
    return {name: _steps(ranks, name) for name in names}


def _steps(ranks: Ranks, name: str) -> list[tuple[float, dict[str, Tensor]]]:
    schedule = make_schedule(name, ranks.world_size, 8, None, WORDS)
    each = LAYERS // schedule.stages
    modules = {
        (direction, stage): Part(range(stage * each, (stage + 1) * each))
        for direction, stage in schedule.local(ranks.rank)
    }
    runtime = Runtime(schedule, modules, loss_of, group=None, device=CPU)
    found = []
    for step in range(STEPS):
        x, condition, target = (part.chunk(8) for part in batch(step))
        for module in modules.values():
            module.zero_grad()
        losses = runtime.run(
            [(part, torch.zeros(len(part))) for part in x],
            [{"condition": part} for part in condition],
            target,
        )
        gradients = {
            f"{direction} {name}": parameter.grad.clone()
            for (direction, _), module in modules.items()
            for name, parameter in module.named_parameters()
        }
        found.append((sum(loss.item() for loss in losses.values()), gradients))
        for module in modules.values():
            _move(module)
    return found


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_every_schedule_gives_the_gradients_of_one_rank(world_size: int) -> None:
    names = list(NAMES)
    expected = one_rank()
    results = run_ranks(pipelined, world_size, names=names)
    for name in names:
        seen: set[str] = set()
        for step, (loss, gradients) in enumerate(expected):
            assert sum(result[name][step][0] for result in results) == pytest.approx(
                loss, abs=TOLERANCE
            )
            for found in (result[name][step][1] for result in results):
                seen |= found.keys()
                for key, gradient in found.items():
                    wanted = gradients[key.split(" ")[1]]
                    difference = (gradient - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
                    assert difference <= TOLERANCE, (name, step, key)
        directions = 2 if name in ("bitpipe", "chimera") else 1
        assert len(seen) == directions * len(expected[0][1]), name


def test_the_runtime_writes_no_schedules_where_a_rank_fails() -> None:
    level = schedules.logger.level
    assert schedules.logger.isEnabledFor(logging.ERROR)
    silence_schedules()
    try:
        assert not schedules.logger.isEnabledFor(logging.ERROR)
    finally:
        schedules.logger.setLevel(level)
