"""Ranks that share matrix products, and the tokens between them, train what one device trains.

For every family, and for options of them that change what is cut. Weights are drawn anew, large, so that
nothing of a network is zero and whatever one block does wrong is seen in the first loss.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flows.initialise import Rule
from parallel import processes
from parallel.activation import Recompute
from parallel.engines import native
from parallel.engines.native import NativeEngine
from parallel.initialise import fill_parameters
from parallel.mesh import build_mesh, resolve_layout
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario
from tests.trainer import families
from trainer.assembly import build_objective, plan
from trainer.drawing import calls_parts, draw_samples, find_shared
from trainer.recipe import Recipe
from trainer.running import open_loader

EXACT, NORM = 1e-5, 1e-6
CPU = torch.device("cpu")
STEPS, RATE, STD = 4, 1e-3, 0.05
KEEP = Recompute(0)

OPTIONS: dict[str, dict[str, Any]] = {
    "dit, dyt and peri": {
        "model": {
            "patch": 2, "width": 32, "depth": 2, "heads": 2, "norm": "dyt", "norm_affine": True,
            "norm_placement": "peri",
        },
    },
    "mmdit, plain": {
        **families.TINY["mmdit"],
        "model": {
            "family": "mmdit", "patch": 4, "width": 32, "double_depth": 2, "single_depth": 0, "heads": 2,
            "rope": False, "qk_norm": False, "pool_text": True, "class_label": True, "mask_text": False,
        },
    },
    "mmdit, one stream": {
        **families.TINY["mmdit"],
        "model": {
            "family": "mmdit", "patch": 4, "width": 32, "double_depth": 1, "single_depth": 1, "heads": 2,
            "rope": False, "qk_norm": False,
        },
    },
    "tarflow, post": {
        "model": {
            "family": "tarflow", "patch": 2, "width": 32, "flow_blocks": 2, "layers": 1, "head_width": 16,
            "norm": "rms", "placement": "post",
        },
        "objective": {"noise": 0.1, "dequantisation": "none"},
    },
    "starflow, grouped and gated": {
        "model": {
            "family": "starflow", "patch": 2, "width": 64, "layers": [1, 2], "head_width": 16, "kv_heads": 2,
            "bias": False, "qk_norm": True, "gated": True, "norm": "rms", "placement": "peri",
            "position": "learned", "conditioned": "all",
        },
    },
    "dit, four heads": {
        "model": {"patch": 2, "width": 32, "depth": 2, "heads": 4, "qk_norm": True, "rope": True},
    },
    "token_dit": {
        "model": {"family": "token_dit", "width": 32, "depth": 2, "heads": 2, "levels": 5},
    },
}  # fmt: skip
CASES = families.TINY | OPTIONS
# Routers do not know of tokens that are cut over tp, and are refused under it.
WITHOUT_SEQUENCE = {"dit_moe"}
WAYS = [
    (name, sequence)
    for name in CASES
    for sequence in (False, True)
    if not (sequence and name in WITHOUT_SEQUENCE)
]


DRAWN = ("dit", "mmdit", "tarflow", "volume-preserving", "starflow", "jet")


def key(name: str, sequence: bool) -> str:
    return f"{name}{' in sequence' if sequence else ''}"


def trained(
    name: str, ranks: int, recompute: Recompute = KEEP, compile: bool = False, **layout: Any
) -> dict[str, Any]:
    """First weights, and what `STEPS` steps from large ones made of them."""
    recipe = families.recipe(name, Path("/nowhere", name), own=CASES[name])
    made, laid = plan(recipe, 1), resolve_layout(None, None, None, ranks, **layout)
    with torch.device("meta"):
        model = made.model.build()
    engine = native.build(
        model,
        laid,
        build_mesh(laid, CPU),
        replace(scenario.PLAIN, recompute=recompute, compile=compile),
        scenario.start(seed=1),
    )
    first = scenario.whole(engine.parameters())
    rules = {parameter: Rule.normal(STD) for parameter in engine.parameters()}
    fill_parameters(engine.parameters(), rules, seed=5)
    with open_loader(made, engine.data_rank, engine.data_size, CPU) as loader:
        found = {"first": first} | steps(engine, build_objective(recipe), loader)
    return found | ({"drawn": drawn(engine, recipe)} if name in DRAWN else {})


def drawn(engine: NativeEngine, recipe: Recipe) -> Tensor:
    """Samples as a training draws them, the same on every rank."""

    def draw(model: nn.Module) -> Tensor:
        shared = find_shared(model, recipe, CPU, batch=4)
        ids = torch.arange(4)
        return draw_samples(model, recipe, ids, CPU, batch=4, as_images=False, shared=shared).images

    return engine.run(draw, whole=calls_parts(recipe))


def steps(engine: NativeEngine, objective: Any, loader: Any) -> dict[str, Any]:
    losses, norms = [], []
    for step in range(STEPS):
        result = engine.forward_backward([next(loader)], objective, 1, step, families.BATCH)
        losses.append(engine.sum_over_data(result.loss.sum()) / families.BATCH)
        norms.append(engine.clip_gradients(1.0))
        engine.step(RATE, torch.zeros(()))
    weights = scenario.whole(engine.parameters())
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "weights": weights}


def on_two_ranks(ranks: Ranks) -> dict[str, Any]:
    found = {}
    for name, sequence in WAYS:
        found[key(name, sequence)] = trained(name, ranks.world_size, tp=2, sequence=sequence)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeEngine, "_sum_partial", lambda _: None)
        found["never summed"] = trained("lightningdit", ranks.world_size, tp=2, sequence=True)
    return found


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, timeout=280.0)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    processes.start("cpu", 60)
    found = {name: trained(name, 1) for name in CASES}
    processes.stop()
    return found


# On two by two ranks, tokens divided by cp and then by tp.
ALONGSIDE: dict[str, dict[str, Any]] = {
    "dit": {"context": "ring", "sequence": True},
    "dit, four heads": {"context": "ulysses", "sequence": True},
    "tarflow, post": {"context": "ring", "sequence": True, "recompute": Recompute(1, "products")},
    "starflow": {"context": "ring", "sequence": True, "recompute": Recompute(1)},
    "mmdit": {"context": "ring"},
    "jet": {"context": "ring", "sequence": True},
}
COMPILED = ("dit", "starflow", "mmdit")


def on_four_ranks(ranks: Ranks) -> dict[str, Any]:
    return {
        name: trained(name, ranks.world_size, tp=2, cp=2, **ways)
        for name, ways in ALONGSIDE.items()
    }


def compiled_on_two_ranks(ranks: Ranks) -> dict[str, Any]:
    return {
        name: trained(name, ranks.world_size, tp=2, sequence=True, compile=True)
        for name in COMPILED
    }


def errors(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    # Likelihoods pass through zero, where nothing is relative to them.
    losses = (ours["losses"] - theirs["losses"]).abs().max() / theirs["losses"].abs().mean()
    return {
        "losses": float(losses),
        "norms": scenario.relative(ours["norms"], theirs["norms"]),
        "weights": scenario.distance(ours["weights"], theirs["weights"]),
    }


def hold(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    found = errors(ours, theirs)
    assert found["losses"] <= EXACT
    assert found["norms"] <= NORM
    assert found["weights"] <= EXACT


@pytest.mark.parametrize(("name", "sequence"), WAYS)
def test_ranks_that_share_products_train_as_one_does(one, two, name, sequence):
    for rank in two:
        hold(rank[key(name, sequence)], one[name])


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_samples_are_those_of_one_device(one, two, name, sequence):
    expected = one[name]["drawn"]
    assert expected.std() > 0.1
    for rank in two:
        assert scenario.relative_norm(rank[key(name, sequence)]["drawn"], expected) <= EXACT


@pytest.mark.parametrize(("name", "sequence"), WAYS)
def test_first_weights_are_those_of_one_device(one, two, name, sequence):
    for rank in two:
        first = rank[key(name, sequence)]["first"]
        different = [n for n, w in one[name]["first"].items() if not torch.equal(first[n], w)]
        assert not different


def test_the_law_notices_gradients_of_a_part_of_the_work(one, two):
    found = errors(two[0]["never summed"], one["lightningdit"])
    assert found["norms"] > 100 * NORM
    assert found["weights"] > 10 * EXACT


@pytest.mark.slow
def test_products_and_sequences_may_be_shared_at_once(one):
    for rank in run_ranks(on_four_ranks, 4, timeout=250.0):
        for name, found in rank.items():
            hold(found, one[name])


@pytest.mark.slow
def test_compiled_blocks_share_products_and_tokens(one):
    for rank in run_ranks(compiled_on_two_ranks, 2, timeout=280.0):
        for name, found in rank.items():
            hold(found, one[name])
