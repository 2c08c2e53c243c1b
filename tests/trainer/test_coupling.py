"""What samples make of each other does not depend on which rank has them."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from flows.batch import Batch
from flows.objectives.flow_matching import FlowMatching
from parallel.mesh import resolve_layout
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario
from trainer.coupling import coupled

EXACT = 1e-5
STEPS = 4


@dataclass(frozen=True)
class Towards(FlowMatching):
    """Each image is moved by the mean of all, and towards the one that follows it in the stream."""

    @property
    def couple(self):
        return self._couple

    def _couple(self, batch: Batch, whole: Batch, seed: int, step: int) -> Batch:
        assert torch.equal(whole.position, whole.position.sort().values)
        index = torch.searchsorted(whole.position, batch.position)
        following = whole.image[(index + 1) % len(whole)]
        return replace(batch, image=following - whole.image.mean(0))


def objective() -> FlowMatching:
    return Towards(**vars(scenario.objective()))


def curve(ranks: int, strategy: str, microbatch: int = scenario.GLOBAL_BATCH) -> dict[str, Any]:
    """Losses and weights; rank 0 has the last samples of a step, so that order must be made."""
    engine = scenario.build(resolve_layout(strategy, None, None, ranks))
    losses = []
    for step in range(STEPS):
        place = engine.data_size - 1 - engine.data_rank
        mine = scenario.share(scenario.global_batch(step), place, engine.data_size)
        mine = coupled(engine, objective(), mine, scenario.SEED, step)
        result = engine.forward_backward(
            list(mine.split(microbatch)), objective(), scenario.SEED, step, scenario.GLOBAL_BATCH
        )
        losses.append(engine.sum_over_data(result.loss.sum()) / scenario.GLOBAL_BATCH)
        engine.clip_gradients(scenario.MAX_NORM)
        engine.step(scenario.LEARNING_RATE, torch.zeros(()))
    return {"losses": torch.stack(losses), "weights": scenario.whole(engine.parameters())}


def on_one(ranks: Ranks) -> dict[str, Any]:
    return {"whole": curve(1, "none"), "accumulated": curve(1, "none", microbatch=3)}


def on_two(ranks: Ranks) -> dict[str, Any]:
    return {"ddp": curve(2, "ddp"), "fsdp accumulated": curve(2, "fsdp", microbatch=1)}


def on_four(ranks: Ranks) -> dict[str, Any]:
    return {"hsdp": curve(4, "hsdp")}


@pytest.fixture(scope="module")
def curves() -> dict[str, dict[str, Any]]:
    results = [
        run_ranks(function, n)[0] for function, n in ((on_one, 1), (on_two, 2), (on_four, 4))
    ]
    return {name: found for result in results for name, found in result.items()}


@pytest.mark.parametrize("name", ["accumulated", "ddp", "fsdp accumulated", "hsdp"])
def test_coupled_samples_train_alike_on_every_layout(curves, name):
    whole, other = curves["whole"], curves[name]
    assert scenario.relative(other["losses"], whole["losses"]) <= EXACT
    assert scenario.distance(other["weights"], whole["weights"]) <= EXACT
