"""How long a training step waits for its data, as a share of the step.

Once as a recipe trains on this machine, where loading and training share the cores; and once with images
that are dear to decode and a step that takes its time elsewhere, as on a GPU.
"""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loader import SHARDS, SIZE
from benchmarks.loader_shards import make_shards
from benchmarks.loader_sides import Flowmill, Setting
from benchmarks.overhead import Nobody
from trainer.metrics_log import read
from trainer.recipe import load_recipe
from trainer.run_folder import RunFolder
from trainer.running import run_training


@dataclass(frozen=True)
class Waits:
    """How long steps took, and how long they waited for data.

    step_seconds: the median; longest_seconds: the longest wait
    share: of the time of all steps together that was waiting
    """

    what: str
    steps: int
    step_seconds: float
    longest_seconds: float
    share: float


def in_training(name: str, overrides: Sequence[str], *, steps: int, warm_up: int) -> Waits:
    """Train a recipe on one rank, in a folder that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="wait-") as folder:
        length = [f"train.steps={warm_up + steps}", "train.samples=0", "train.epochs=0"]
        quiet = ["tracking.mlflow=false", "sample.every=0", f"checkpoint.every={warm_up + steps}"]
        recipe = load_recipe(name, [*overrides, *length, *quiet, f"run.dir={folder}/run"])
        run_training(recipe, 1, Nobody())
        lines = list(read(RunFolder(Path(recipe.run.dir)).metrics))[warm_up:]
    took = [float(line["step_seconds"]) for line in lines]
    waited = [float(line["data_wait_seconds"]) for line in lines]
    return _of(" ".join([name, *overrides]), took, waited)


def beside_a_device(setting: Setting, *, step: float, steps: int, warm_up: int) -> Waits:
    """Load JPEGs for steps that each leave the processor alone for `step` seconds."""
    took, waited = [], []
    with tempfile.TemporaryDirectory(prefix="wait-") as folder:
        samples = setting.batch * max(steps, SHARDS)
        shards = make_shards(Path(folder), samples=samples, size=SIZE, shards=SHARDS)
        with Flowmill(shards, setting).loader() as loader:
            for _ in range(warm_up + steps):
                began = time.perf_counter()
                next(loader)
                waited.append(loader.wait_seconds)
                time.sleep(step)
                took.append(time.perf_counter() - began)
    what = f"{setting.batch} JPEGs of {SIZE} x {SIZE}, a device's step of {step * 1e3:g} ms"
    return _of(what, took[warm_up:], waited[warm_up:])


def _of(what: str, took: Sequence[float], waited: Sequence[float]) -> Waits:
    share = sum(waited) / sum(took)
    return Waits(what, len(took), statistics.median(took), max(waited), share)
