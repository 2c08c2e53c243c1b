"""The small problem on which claims of papers are tried: eight Gaussians on a circle, and a small network.

Radius 2, standard deviation 0.15; a SiLU network of three layers of 192; 4,000 steps of Adam on batches of
512, an average of the weights. Distances are energy distances to 4,096 fresh samples of the data.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.batch import Batch
from flows.initialise import Rule, initialise
from flows.objectives.flow_matching import FlowMatching
from flows.paths import LINEAR, Path
from flows.randomness import Draw
from flows.samplers.ode import OdeSolver, solve_ode
from flows.samplers.sampler import time_grid
from flows.times import TimeDistribution

CLASSES = 8
RADIUS, STD = 2.0, 0.15
WIDTH = 192
STEPS, BATCH, SAMPLES = 4000, 512, 4096
CHUNK = 20  # steps whose numbers are drawn together
RATE, DECAY = 2e-3, 0.999
UNIFORM = TimeDistribution("uniform", 0.0, 1.0, 1.0)
FRESH = 2**40  # where the positions of samples that nothing is trained on begin

Source = Callable[[Draw], tuple[Tensor, Tensor]]


def centres() -> Tensor:
    """(8, 2)"""
    angle = torch.arange(CLASSES) * (2 * math.pi / CLASSES)
    return RADIUS * torch.stack((angle.cos(), angle.sin()), 1)


def eight_gaussians(draw: Draw) -> tuple[Tensor, Tensor]:
    """(batch, 2) points and (batch,) which of the Gaussians each is of."""
    label = (draw.uniform("class") * CLASSES).long()
    return centres()[label] + STD * draw.normal("data", (2,)), label


class Network(nn.Module):
    """F(x, t, label): (batch, dimensions), (batch,), (batch,) -> (batch, dimensions)."""

    def __init__(self, dimensions: int, labelled: bool) -> None:
        super().__init__()
        self.labels = CLASSES + 1 if labelled else 0
        sizes = (dimensions + 1 + self.labels, WIDTH, WIDTH, WIDTH, dimensions)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        told = [x.flatten(1), t[:, None]]
        if self.labels:
            told.append(F.one_hot(label, self.labels).to(x.dtype))
        hidden = torch.cat(told, 1)
        for layer in self.layers[:-1]:
            hidden = F.silu(layer(hidden))
        result: Tensor = self.layers[-1](hidden)
        return result.reshape(x.shape)

    def init_rules(self) -> dict[str, Rule]:
        """Uniform within 1 / sqrt(inputs), PyTorch's own."""
        return {
            f"layers.{index}.{part}": Rule.uniform(layer.in_features**-0.5)
            for index, layer in enumerate(self.layers)
            if isinstance(layer, nn.Linear)
            for part in ("weight", "bias")
        }

    def reset_buffers(self) -> None:
        """There are none."""


@dataclass(frozen=True)
class Row:
    """One claim: what was asked for, what was found, whether it is met."""

    paper: str
    claim: str
    gate: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Trained:
    """A network and what it was trained on."""

    network: Network
    objective: FlowMatching

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.objective.velocity(self.network(x, t, label), x, t)

    def field(self, x: Tensor, t: float) -> Tensor:
        """The velocity at one time, without a class."""
        label = torch.full((len(x),), CLASSES)
        return self.velocity(x, torch.full((len(x),), t), label)

    def sample(self, steps: int, solver: OdeSolver = "euler", seed: int = 1) -> Tensor:
        """(4096, 2) from fresh noise."""
        return self.carry(fresh_noise(seed), steps, solver)

    def carry(self, noise: Tensor, steps: int, solver: OdeSolver = "euler") -> Tensor:
        """Where the ODE brings noise."""
        support = self.objective.path.support(self.objective.prediction, sampling=True)
        return solve_ode(
            self.field, noise, time_grid(steps, support.low, support.high, 1.0), solver
        )


def objective(path: Path = LINEAR, label_drop: float = 1.0, **options: object) -> FlowMatching:
    """Flow matching with options, without labels unless they are asked for."""
    given = {
        "path": path,
        "prediction": "velocity",
        "weighting": "none",
        "label_drop": label_drop,
        "null_label": CLASSES,
        "time": UNIFORM,
    }
    return FlowMatching(**(given | options))  # type: ignore[arg-type]


def fresh_noise(seed: int, count: int = SAMPLES) -> Tensor:
    return Draw(seed, 0, torch.arange(count) + FRESH).normal("noise", (2,))


def fresh_data(seed: int = 1, count: int = SAMPLES) -> Tensor:
    return eight_gaussians(Draw(seed, 0, torch.arange(count) + FRESH))[0]


def train(
    chosen: FlowMatching,
    *,
    seed: int = 0,
    steps: int = STEPS,
    source: Source = eight_gaussians,
    pairs: tuple[Tensor, Tensor] | None = None,
    start: Network | None = None,
    labelled: bool = False,
) -> Trained:
    """The averaged network after `steps` steps.

    pairs: (noise, data) of a reflow, in place of `source`
    start: a network to go on from, in place of a fresh one
    """
    dimensions = (pairs[1] if pairs else source(Draw(0, 0, torch.zeros(1).long()))[0])[0].numel()
    network = copy.deepcopy(start) if start else Network(dimensions, labelled)
    if start is None:
        initialise(network, seed)
    average = [weight.detach().clone() for weight in network.parameters()]
    weights: list[Tensor] = list(network.parameters())
    optimizer = torch.optim.Adam(weights, lr=RATE, fused=True)
    for step in range(steps):
        if step % CHUNK == 0:
            parts = _prepared(chosen, seed, step // CHUNK, source, pairs)
        inputs, targets = next(parts)
        chosen.loss(network(**inputs), targets).mean().backward()
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - min(DECAY, (1 + step) / (10 + step)))
    with torch.no_grad():
        for weight, mean in zip(weights, average, strict=True):
            weight.copy_(mean)
    return Trained(network.eval(), chosen)


def _prepared(
    chosen: FlowMatching, seed: int, chunk: int, source: Source, pairs: tuple[Tensor, Tensor] | None
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Inputs and targets of the steps of a chunk: drawn together, for drawing few numbers is slow."""
    count = CHUNK * BATCH
    position = torch.arange(count) + chunk * count
    draw = Draw(seed, chunk, position)
    if pairs is None:
        data, label = source(draw)
        batch = Batch(data, label, position)
    else:
        noise, data = pairs
        index = (draw.uniform("pair") * len(data)).long()
        label = torch.full((count,), CLASSES)
        batch = Batch(data[index], label, position, {"noise": noise[index]})
    for part in batch.split(BATCH) if chosen.contrast else [batch]:
        if chosen.couple is not None:
            part = chosen.couple(part, part, seed, chunk)
        ready = chosen.prepare(part, Draw(seed, chunk, part.position))
        for rows in torch.arange(len(part)).split(BATCH):
            yield tuple(  # type: ignore[misc]
                {name: value[rows] for name, value in held.items()}
                for held in (ready.inputs, ready.targets)
            )


def energy(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| without bias: about 0 for samples of one law, and as often below."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    between = torch.cdist(x, y).mean()
    within = [torch.cdist(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y)]
    return float(2 * between - within[0] - within[1])


class Baseline:
    """Rectified flow on the eight Gaussians, against which others are held; trained when it is asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.data = fresh_data()

    @cached_property
    def flow(self) -> Trained:
        return train(objective(), seed=self.seed)

    def distance(self, trained: Trained, steps: int) -> float:
        """Energy distance of its samples by `steps` Euler steps to the data."""
        return energy(trained.sample(steps), self.data)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """(noise, data) of the flow's ODE, for a reflow."""
        draw = Draw(self.seed + 1, 0, torch.arange(32768) + 2 * FRESH)
        noise = draw.normal("noise", (2,))
        return noise, torch.cat([self.flow.carry(part, 25, "heun") for part in noise.split(8192)])

    @cached_property
    def straight(self) -> Trained:
        """The second rectified flow: trained anew on pairs of the first, beginning at its weights."""
        return train(objective(), seed=self.seed, pairs=self.pairs, start=self.flow.network)
