"""What Accelerate prepares trains what one device trains, and is what was asked for."""

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flows.errors import UserError
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
    ),
    pytest.mark.timeout(600),
]

EXACT = 1e-5
# Kind, how the engine is made, and samples a microbatch.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddp": ("ddp", {}, 8),
    "ddp accumulated": ("ddp", {}, 1),
    "fsdp": ("fsdp", {}, 8),
    "fsdp accumulated, unequal, recomputed": ("fsdp", {"checkpoint_activations": 1}, 3),
    "fsdp kept": ("fsdp", {"reshard_after_forward": False}, 8),
}


def on_two_ranks(ranks: Ranks) -> dict[str, Any]:
    return {
        "curves": {name: curve(*case) for name, case in CASES.items()},
        "wrapped": {kind: wrapped(kind) for kind in ("ddp", "fsdp")},
        "sampled": {kind: sampled(kind) for kind in ("ddp", "fsdp")},
        "deepspeed": scenario.train(scenario.build_accelerated("deepspeed")).plain(),
        "fallback": fallback(),
    }


def curve(kind: str, how: dict[str, Any], microbatch: int) -> dict[str, Any]:
    engine = scenario.build_accelerated(kind, **how)
    return scenario.train(engine, microbatch=microbatch).plain()


def wrapped(kind: str) -> dict[str, Any]:
    engine: Any = scenario.build_accelerated(kind)
    model = engine._model.trained
    return {
        "ddp": isinstance(model, DistributedDataParallel),
        "fsdp": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "cut": all(isinstance(p, DTensor) for p in engine.parameters().values()),
    }


def sampled(kind: str) -> float:
    """Samples of all ranks together, against those of one device."""
    engine = scenario.build_accelerated(kind)
    scenario.train(engine, steps=2)
    model = scenario.single_device_model()
    model.load_state_dict(scenario.whole(engine.parameters()))
    batch = scenario.global_batch(99)
    inputs = {"x": batch.image, "t": torch.linspace(0.1, 0.9, len(batch)), "label": batch.label}
    with torch.no_grad():
        expected = model(**inputs)
    found = [engine.run(lambda network: network(**inputs), whole=whole) for whole in (True, False)]
    return max(scenario.relative_norm(one, expected) for one in found)


def fallback() -> str:
    """A config with `use_cpu: true` makes Accelerate drop DeepSpeed for DDP in silence."""
    try:
        scenario.build_accelerated("deepspeed", environment={"ACCELERATE_USE_CPU": "true"})
    except UserError as error:
        return str(error)
    finally:
        del os.environ["ACCELERATE_USE_CPU"]
    return "nothing was said"


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2, timeout=500.0)


@pytest.fixture(scope="module")
def plain() -> scenario.Curve:
    return scenario.plain_loop()


def close(curve: dict[str, Any], plain: scenario.Curve) -> None:
    errors = {
        "loss": scenario.relative(curve["losses"], plain.losses),
        "norm": scenario.relative(curve["norms"], plain.norms),
        "weights": scenario.distance(curve["weights"], plain.weights),
    }
    assert max(errors.values()) <= EXACT, errors


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_does(plain, two, name):
    for result in two:
        close(result["curves"][name], plain)


def test_its_deepspeed_plugin_trains_as_one_device_does(plain, two):
    for result in two:
        close(result["deepspeed"], plain)


def test_models_are_wrapped_as_asked(two):
    """Each block by itself, and the rest; the config's DDP where it asks for that."""
    for result in two:
        assert result["wrapped"]["ddp"] == {"ddp": True, "fsdp": 0, "cut": False}
        units = scenario.CONFIG.depth + 1
        assert result["wrapped"]["fsdp"] == {"ddp": False, "fsdp": units, "cut": True}


def test_samples_are_those_of_one_device(two):
    for result in two:
        assert max(result["sampled"].values()) <= 1e-6


def test_a_silent_fallback_is_refused(two):
    for result in two:
        assert result["fallback"].startswith(
            "Accelerate was asked for deepspeed on 2 ranks and made MULTI_CPU on 2;"
        )
