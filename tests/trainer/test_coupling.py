"""What samples make of each other does not depend on which rank has them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flows.batch import Batch
from flows.couplings import Coupling
from flows.objectives.flow_matching import FlowMatching
from parallel.mesh import resolve_layout
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario
from trainer.coupling import coupled

EXACT = 1e-5
STEPS = 3
OPTIONS = {
    "assignment": {"coupling": Coupling("assignment", 1.0, 0)},
    "groups": {"coupling": Coupling("assignment", 1.0, 4)},
    "entropic": {"coupling": Coupling("entropic", 4.0, 0), "bridge": 0.5},
    "stable": {"coupling": Coupling("stable", 1.0, 0)},
    "weighted": {"coupling": Coupling("weighted", 60.0, 0)},
    "contrastive": {"contrast": 0.05},
    "all": {"coupling": Coupling("assignment", 1.0, 0), "contrast": 0.05},
}


def objective(name: str) -> FlowMatching:
    return replace(scenario.objective(), **OPTIONS[name])


def share(step: int, place: int, size: int) -> Batch:
    """Rank 0 has the last samples of a step, so that their order must be made."""
    return scenario.share(scenario.global_batch(step), size - 1 - place, size)


def curve(
    name: str, ranks: int, strategy: str, microbatch: int = 8, alone: bool = False
) -> dict[str, Any]:
    """Losses and weights; `alone`: each rank couples what it has, as it must not."""
    engine = scenario.build(resolve_layout(strategy, None, None, ranks))
    losses = []
    for step in range(STEPS):
        mine = share(step, engine.data_rank, engine.data_size)
        if alone:
            couple = objective(name).couple
            assert couple is not None
            mine = couple(mine, mine.take(mine.position.argsort()), scenario.SEED, step)
        else:
            mine = coupled(engine, objective(name), mine, scenario.SEED, step)
        result = engine.forward_backward(
            list(mine.split(microbatch)), objective(name), scenario.SEED, step, 8
        )
        losses.append(engine.sum_over_data(result.loss.sum()) / 8)
        engine.clip_gradients(scenario.MAX_NORM)
        engine.step(scenario.LEARNING_RATE, torch.zeros(()))
    return {"losses": torch.stack(losses), "weights": scenario.whole(engine.parameters())}


def on_one(ranks: Ranks) -> dict[str, Any]:
    return {
        name: {"one": curve(name, 1, "none"), "accumulated": curve(name, 1, "none", microbatch=3)}
        for name in OPTIONS
    }


def on_two(ranks: Ranks) -> dict[str, Any]:
    return {
        name: {
            "ddp": curve(name, 2, "ddp"),
            "fsdp accumulated": curve(name, 2, "fsdp", microbatch=1),
            "alone": curve(name, 2, "ddp", alone=True),
        }
        for name in OPTIONS
    }


def on_four(ranks: Ranks) -> dict[str, Any]:
    return {name: {"hsdp": curve(name, 4, "hsdp")} for name in OPTIONS}


@pytest.fixture(scope="module")
def curves() -> dict[str, dict[str, Any]]:
    results = [
        run_ranks(function, n)[0] for function, n in ((on_one, 1), (on_two, 2), (on_four, 4))
    ]
    return {name: {k: v for found in results for k, v in found[name].items()} for name in OPTIONS}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["accumulated", "ddp", "fsdp accumulated", "hsdp"])
def test_coupled_samples_train_alike_on_every_layout(curves, name, layout):
    one, other = curves[name]["one"], curves[name][layout]
    assert scenario.relative(other["losses"], one["losses"]) <= EXACT
    assert scenario.distance(other["weights"], one["weights"]) <= EXACT


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "groups"])
def test_the_law_notices_ranks_that_couple_their_own(curves, name):
    one, alone = curves[name]["one"], curves[name]["alone"]
    assert scenario.relative(alone["losses"], one["losses"]) > 10 * EXACT


def test_groups_that_ranks_hold_whole_are_no_different(curves):
    one, alone = curves["groups"]["one"], curves["groups"]["alone"]
    assert scenario.relative(alone["losses"], one["losses"]) <= EXACT
