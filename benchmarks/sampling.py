"""Ways to sample a normalizing flow on this machine: sequentially, by parallel iterations, automatically.

All carry the same noise through the same trained flow, so they differ in time, in network calls, and in
how exactly they solve for the samples: by the root of the mean square difference from the sequential
ones, and by the energy distance to held-out images. Ways take turns, so that a machine that slows down
slows all of them; one that has used up its share of the time takes no more turns.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flows.errors import UserError
from flows.metrics.energy import energy_distance
from flows.models.autoregressive import FlowBlock
from flows.models.dequantised import Dequantised
from flows.models.starflow import STARFlow
from flows.models.tarflow import TarFlow
from flows.samplers.denoise import denoise_by_score
from flows.samplers.inversion import (
    SEQUENTIAL,
    AutoregressiveFlow,
    Inverted,
    Strategy,
    invert,
    prior,
)
from flows.samplers.inversion_guidance import FlowGuidance
from flows.samplers.inversion_search import Choice, choose_strategy
from parallel.processes import alone
from trainer.asked import ask
from trainer.flow_sections import InversionSection, LikelihoodSection
from trainer.real_images import read_real
from trainer.recipe import Recipe, override_recipe
from trainer.run_folder import RunFolder, open_run
from trainer.running import run_training
from trainer.trained import load_trained

Ways = Mapping[str, Strategy | list[Strategy]]

AUTOMATIC = "automatic"
# Over sequential sampling. The second is 1 but for the noise of the clock: where the choice is sequential
# itself, both run the same code.
FASTER, NOT_SLOWER = 3.0, 0.95
CHUNK = 512
JUDGED_AT_ONCE = 32
LINES = 10  # about how many of a training


@dataclass(frozen=True)
class Way:
    """One way to sample.

    seconds: batch size -> median seconds of a batch
    turns: batch size -> how many that is the median of
    network_calls: passes through the depth of the network for a sample
    difference: root mean square difference from sequential samples, relative to theirs
    distance: energy distance of the samples to held-out images
    """

    name: str
    seconds: dict[int, float]
    turns: dict[int, int]
    network_calls: float
    difference: float
    distance: float


@dataclass(frozen=True)
class Goal:
    """A speed over sequential sampling that is wanted of a way."""

    what: str
    wanted: float
    found: float

    @property
    def met(self) -> bool:
        return self.found >= self.wanted


@dataclass(frozen=True)
class SamplingCost:
    """What was found.

    ways: sequential first; the calls, difference and distance of `automatic` are those of the choice
        for the smallest batch
    choices: batch size -> what the automatic search chose for each block, the top block first
    """

    model: str
    device: str
    threads: int
    samples: int
    ways: list[Way]
    choices: dict[int, list[Choice]]

    def speedup(self, way: str, batch: int) -> float:
        """Of a way over sequential sampling."""
        chosen = next(found for found in self.ways if found.name == way)
        return self.ways[0].seconds[batch] / chosen.seconds[batch]

    @property
    def goals(self) -> list[Goal]:
        """Of the automatic choice: much faster for the smallest batch, and slower for none."""
        sizes = sorted(self.choices)
        speeds = {size: self.speedup(AUTOMATIC, size) for size in sizes}
        return [
            Goal(f"automatic, batch {sizes[0]}, over sequential", FASTER, speeds[sizes[0]]),
            Goal("automatic, any batch, over sequential", NOT_SLOWER, min(speeds.values())),
        ]


@dataclass(frozen=True)
class Subject:
    """A trained flow and all that decides its samples but the way to them.

    noise: of its training
    denoise: share of it that is taken out of samples
    variance: of the prior of a flow that preserves volume; None for 1
    """

    model: AutoregressiveFlow
    recipe: Recipe
    guidance: FlowGuidance
    noise: float
    denoise: float
    device: torch.device
    variance: Tensor | None

    def draw(
        self, ids: range, strategy: Strategy | Sequence[Strategy], tolerance: float
    ) -> Inverted:
        """Samples of these ids."""
        samples = torch.arange(ids.start, ids.stop, device=self.device)
        asked = self.asked(ids)
        return invert(
            self.model,
            prior(self.model, self.recipe.seed, samples, self.variance),
            asked["label"],
            asked.get("text"),
            strategy=strategy,
            guidance=self.guidance,
            tolerance=tolerance,
        )

    def cleaned(self, x: Tensor, ids: range) -> Tensor:
        """Samples without the noise of the training."""
        if not self.noise * self.denoise:
            return x
        flow = cast(nn.Module, self.model)
        asked = self.asked(ids)
        found = denoise_by_score(
            flow, x, asked, noise=self.noise, scale=self.denoise, variance=self.variance
        )
        return found.sample

    def asked(self, ids: range) -> dict[str, Tensor]:
        """What the samples of these ids are to be."""
        return ask(self.recipe, torch.arange(ids.start, ids.stop)).condition(self.device)


def train_and_measure(recipe: Recipe, note: Callable[[str], None], **how: Any) -> SamplingCost:
    """Train a flow in a folder of its own, then `measure` it."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = override_recipe(
            recipe, [f"run.dir={folder}/run", "tracking.mlflow=false", "sample.every=0"]
        )
        note(f"training {recipe.name} for {recipe.train.steps} steps")
        run_training(recipe, 1, _Told(note, recipe.train.steps))
        return measure(RunFolder(Path(recipe.run.dir)), recipe, note, **how)


def measure_run(run: str, note: Callable[[str], None], **how: Any) -> SamplingCost:
    """`measure` the flow of a run's newest checkpoint."""
    folder, recipe = open_run(run)
    return measure(folder, recipe, note, **how)


def measure(
    run: RunFolder,
    recipe: Recipe,
    note: Callable[[str], None],
    *,
    batches: Sequence[int],
    rounds: int,
    patience: float,
    samples: int,
    group: int,
    tolerance: float,
) -> SamplingCost:
    """Sample the newest checkpoint of a run in every way.

    batches: sizes to take times of
    rounds: batches of each size in each way, but no more than
    patience: seconds that a way may take for the batches of one size; the first two are always taken
    samples: of each way, to judge it by
    group: tokens of a group of GS-Jacobi
    tolerance: of iterations, see `flows.samplers.inversion.invert`
    Raises UserError for a model that is not inverted token by token, or without held-out images.
    """
    subject = _subject(run, recipe)
    chain = cast(FlowBlock, subject.model.flow_blocks[0]).shape.chain
    ways: dict[str, Strategy] = {
        "sequential": SEQUENTIAL,
        "Jacobi": Strategy(chain),
        "GS-Jacobi": Strategy(group),
        "sliding GS-Jacobi": Strategy(group, sliding=True),
    }

    def with_choice(choices: list[Choice]) -> Ways:
        return {**ways, AUTOMATIC: [choice.strategy for choice in choices]}

    choices: dict[int, list[Choice]] = {}
    taken: dict[int, dict[str, list[float]]] = {}
    for size in batches:
        note(f"batches of {size}: searching for the automatic choice")
        choices[size] = _search(subject, size, tolerance)
        note(f"batches of {size}: groups of {_groups(choices[size])} tokens; timing every way")
        taken[size] = _times(subject, with_choice(choices[size]), size, rounds, patience, tolerance)
        medians = ((name, statistics.median(times)) for name, times in taken[size].items())
        found = ", ".join(f"{name} {median * 1e3:.0f} ms" for name, median in medians)
        note(f"batches of {size}: {found}")
    note(f"judging {samples} samples of each way")
    judged = _judge(subject, with_choice(choices[min(batches)]), samples, tolerance)
    return SamplingCost(
        recipe.name,
        subject.device.type,
        torch.get_num_threads(),
        samples,
        [
            Way(
                name,
                {size: statistics.median(taken[size][name]) for size in batches},
                {size: len(taken[size][name]) for size in batches},
                *judged[name],
            )
            for name in judged
        ],
        choices,
    )


def _subject(run: RunFolder, recipe: Recipe) -> Subject:
    device = alone().device
    section, objective = recipe.sample, recipe.objective
    trained = load_trained(run, recipe, device, batch=1)
    model, variance = trained.model, trained.shared.variance_on(device)
    # What a dequantiser adds is there to be trained with.
    model = model.flow if isinstance(model, Dequantised) else model
    if not (isinstance(section, InversionSection) and isinstance(model, TarFlow | STARFlow)):
        raise UserError(
            f"{recipe.name} is of the family {recipe.model.family}, which is not inverted token by "
            "token; give a TarFlow or a STARFlow."
        )
    assert isinstance(objective, LikelihoodSection)
    guidance = FlowGuidance(
        weight=section.guidance,
        form=section.form,
        parts=section.parts,
        annealed=section.annealed,
        temperature=section.temperature,
    )
    flow = cast(AutoregressiveFlow, model)
    return Subject(flow, recipe, guidance, objective.noise, section.denoise, device, variance)


def _search(subject: Subject, batch: int, tolerance: float) -> list[Choice]:
    asked = subject.asked(range(batch))
    return choose_strategy(
        subject.model,
        batch,
        asked["label"],
        asked.get("text"),
        guidance=subject.guidance,
        tolerance=tolerance,
        accuracy=tolerance,
        seed=subject.recipe.seed + 1,
        variance=subject.variance,
    )


def _times(
    subject: Subject,
    strategies: Ways,
    batch: int,
    rounds: int,
    patience: float,
    tolerance: float,
) -> dict[str, list[float]]:
    """Seconds of batches by each way; every round has other samples."""
    taken: dict[str, list[float]] = {name: [] for name in strategies}
    for turn in range(rounds + 1):
        ids = range(turn * batch, (turn + 1) * batch)
        for name, strategy in strategies.items():
            if turn > 1 and sum(taken[name]) > patience:
                continue
            begin = time.perf_counter()
            subject.draw(ids, strategy, tolerance)
            if subject.device.type == "cuda":
                torch.cuda.synchronize(subject.device)
            taken[name].append(time.perf_counter() - begin)
    # The first turn warms up.
    return {name: times[1:] for name, times in taken.items()}


def _groups(choices: Sequence[Choice]) -> str:
    return ", ".join(str(choice.strategy.group) for choice in choices)


def _judge(
    subject: Subject,
    strategies: Ways,
    samples: int,
    tolerance: float,
) -> dict[str, tuple[float, float, float]]:
    """(network calls, difference, distance) of each way."""
    recipe = subject.recipe
    if recipe.data.heldout is None:
        raise UserError(
            f"{recipe.name} has no data.heldout, and samples are judged against held-out images."
        )
    heldout, _ = read_real(recipe, [recipe.data.heldout], None)
    found: dict[str, tuple[float, float, float]] = {}
    exact = None
    for name, strategy in strategies.items():
        images, calls = [], 0.0
        for start in range(0, samples, JUDGED_AT_ONCE):
            ids = range(start, min(start + JUDGED_AT_ONCE, samples))
            drawn = subject.draw(ids, strategy, tolerance)
            images.append(subject.cleaned(drawn.x, ids).cpu())
            calls += drawn.network_calls * len(ids)
        x = torch.cat(images)
        exact = x if exact is None else exact
        difference = float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt())
        distance = energy_distance(x, heldout, chunk=CHUNK)
        found[name] = (calls / samples, difference, distance)
    return found


class _Told:
    """Whoever watches the training, told of some of its steps."""

    def __init__(self, tell: Callable[[str], None], steps: int) -> None:
        self._tell, self._steps, self._every = tell, steps, max(1, steps // LINES)

    def note(self, text: str) -> None: ...

    def step(self, line: Mapping[str, Any]) -> None:
        done = int(line["step"])
        if done % self._every == 0 or done == self._steps:
            self._tell(f"training: step {done} of {self._steps}, loss {line['loss']:.3f}")
