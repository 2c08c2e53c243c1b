"""Ranks that each have some stages of the network train what one device trains.

For every schedule, for flows that are cut within their blocks, beside FSDP and copies of the model, and
where the work of a stage is shared in turn.
Weights are drawn anew, large, so that nothing of a network is zero.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.initialise import Rule
from parallel import processes
from parallel.activation import Recompute
from parallel.engines import native, pipelined
from parallel.engines.engine import Engine
from parallel.initialise import fill_parameters
from parallel.mesh import build_mesh, resolve_layout
from parallel.pipeline.catalog import NAMES, Words, make_schedule
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario
from tests.trainer import families
from trainer.assembly import build_objective, plan
from trainer.pipelines import chain_costs
from trainer.running import open_loader

EXACT, NORM = 1e-5, 1e-6
CPU = torch.device("cpu")
STEPS, RATE, STD = 3, 1e-3, 0.05
WORDS = Words("parallel.schedule", "parallel.pp", "microbatches", "parallel.chunks")
OWN: dict[str, dict[str, Any]] = {
    "dit": {"model": {"patch": 4, "width": 32, "depth": 6, "heads": 2}},
    "starflow": {
        "model": {
            "family": "starflow", "patch": 2, "width": 48, "layers": [1, 5], "head_width": 24,
            "conditioned": "all",
        },
        "objective": {"power": 1e-2},
    },
    "tarflow": families.TINY["tarflow"],
    "mmdit": families.TINY["mmdit"],
}  # fmt: skip
Case = tuple[str, str, dict[str, Any]]
# Ranks -> (model, schedule, how the model lies over ranks with the same stages).
QUICK: dict[int, list[Case]] = {
    2: [
        ("dit", "1f1b", {}),
        ("dit", "bitpipe", {}),
        ("starflow", "bitpipe", {}),
        ("tarflow", "zbv", {}),
        ("mmdit", "zbv", {}),
    ],
    4: [
        ("starflow", "bitpipe", {}),
        ("dit", "zbv", {"pp": 2, "strategy": "fsdp"}),
        ("dit", "bitpipe", {"pp": 2, "strategy": "ddp"}),
        ("starflow", "zbv", {"pp": 2, "tp": 2, "sequence": True}),
        ("dit", "bitpipe", {"pp": 2, "cp": 2}),
    ],
}
ALL: dict[int, list[Case]] = {
    2: [("dit", name, {}) for name in NAMES if name != "dualpipev"]
    + [("starflow", "1f1b", {}), ("starflow", "interleaved1f1b", {}), ("tarflow", "gpipe", {})],
    4: [
        *(("dit", name, {"microbatch": 1}) for name in NAMES),
        ("starflow", "interleaved_zero_bubble", {}),
        ("dit", "1f1b", {"pp": 2, "strategy": "fsdp"}),
        ("starflow", "bitpipe", {"pp": 2, "strategy": "fsdp"}),
        ("starflow", "zbv", {"pp": 2, "strategy": "fsdp", "recompute": 1}),
        ("mmdit", "bitpipe", {"pp": 2, "strategy": "fsdp"}),
        ("mmdit", "zbv", {"pp": 2, "tp": 2, "sequence": True}),
        ("mmdit", "1f1b", {"pp": 2, "cp": 2, "context": "ring"}),
        ("dit", "1f1b", {"pp": 2, "tp": 2}),
        ("dit", "zbv", {"pp": 2, "tp": 2, "sequence": True}),
        ("starflow", "bitpipe", {"pp": 2, "tp": 2}),
        ("starflow", "1f1b", {"pp": 2, "cp": 2, "strategy": "ddp"}),
        ("starflow", "bitpipe", {"pp": 2, "cp": 2, "context": "ring"}),
    ],
}


def trained(
    model: str,
    ranks: int,
    schedule: str | None = None,
    *,
    pp: int | None = None,
    strategy: Any = None,
    microbatch: int = 2,
    recompute: int = 0,
    **axes: Any,
) -> dict[str, Any]:
    """First weights, and what `STEPS` steps from large ones made of them."""
    recipe = families.recipe(model, Path("/nowhere", model), own=OWN[model])
    made = plan(recipe, 1)
    layout = resolve_layout(
        strategy, None, None, ranks, pp=(pp or ranks) if schedule else 1, **axes
    )
    with torch.device("meta"):
        network = made.model.build()
    mesh, start = build_mesh(layout, CPU), scenario.start(seed=1)
    execution = replace(scenario.PLAIN, recompute=Recompute(recompute))
    engine: Engine
    if schedule is None:
        engine = native.build(network, layout, mesh, execution, start)
    else:
        number = families.BATCH // layout.data_size // microbatch
        order = make_schedule(schedule, layout.pp, number, None, WORDS)
        costs = chain_costs(recipe, made.model, None)[1]
        engine = pipelined.build(network, layout, mesh, order, costs, execution, start)
    first = whole(engine)
    rules = {name: Rule.normal(STD) for name in engine.parameters()}
    fill_parameters(engine.parameters(), rules, seed=5)
    losses, norms = [], []
    objective = build_objective(recipe)
    with open_loader(made, engine.data_rank, engine.data_size, CPU) as loader:
        for step in range(STEPS):
            batches = list(next(loader).split(microbatch))
            result = engine.forward_backward(batches, objective, 1, step, families.BATCH)
            losses.append(engine.sum_over_data(result.loss.sum()) / families.BATCH)
            norms.append(engine.clip_gradients(1.0))
            engine.step(RATE, torch.zeros(()))
    return {
        "first": first,
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "weights": whole(engine),
    }


def whole(engine: Engine) -> dict[str, torch.Tensor]:
    """All weights, as a network that is put together on this rank has them."""
    if isinstance(engine, pipelined.PipelinedEngine):
        return engine.run(
            lambda model: {n: p.detach().clone() for n, p in model.named_parameters()}, whole=True
        )
    return scenario.whole(engine.parameters())


def key(model: str, schedule: str, options: dict[str, Any]) -> str:
    return " ".join((model, schedule, *(f"{name}={value}" for name, value in options.items())))


def on_ranks(ranks: Ranks, cases: list[Case]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for model, schedule, options in cases:
        found[key(model, schedule, options)] = trained(model, ranks.world_size, schedule, **options)
    return found


def never_summed(ranks: Ranks) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelined.PipelinedEngine, "_sum_gradients", lambda _: None)
        return trained("dit", ranks.world_size, "1f1b")


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    processes.start("cpu", 60)
    found = {name: trained(name, 1) for name in OWN}
    processes.stop()
    return found


def errors(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    # Likelihoods pass through zero, where nothing is relative to them.
    losses = (ours["losses"] - theirs["losses"]).abs().max() / theirs["losses"].abs().mean()
    return {
        "losses": float(losses),
        "norms": scenario.relative(ours["norms"], theirs["norms"]),
        "weights": scenario.distance(ours["weights"], theirs["weights"]),
    }


def compare(several: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for rank in several:
        for case, found in rank.items():
            wanted = one[case.split(" ")[0]]
            different = [
                n for n, w in wanted["first"].items() if not torch.equal(found["first"][n], w)
            ]
            assert not different, case
            apart = errors(found, wanted)
            assert apart["losses"] <= EXACT, (case, apart)
            assert apart["norms"] <= NORM, (case, apart)
            assert apart["weights"] <= EXACT, (case, apart)


@pytest.mark.parametrize("world_size", list(QUICK))
def test_ranks_of_a_pipeline_train_as_one_does(one, world_size):
    compare(run_ranks(on_ranks, world_size, timeout=280.0, cases=QUICK[world_size]), one)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", list(ALL))
def test_every_schedule_trains_as_one_rank_does(one, world_size):
    compare(run_ranks(on_ranks, world_size, timeout=290.0, cases=ALL[world_size]), one)


@pytest.mark.slow
def test_the_law_notices_gradients_of_one_stage_alone(one):
    for rank in run_ranks(never_summed, 2):
        found = errors(rank, one["dit"])
        assert found["norms"] > 100 * NORM
        assert found["weights"] > 10 * EXACT
