"""The layout never changes the mathematics: any layout trains what one device trains."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import processes
from parallel.gradients import clip_gradients, gradient_norm
from parallel.mesh import Layout, build_mesh, resolve_layout
from parallel.pieces import local_part
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario

EXACT = 1e-5
# bfloat16 keeps 8 bits; measured 1e-3 on this run.
BF16 = 5e-3


@pytest.fixture(scope="module")
def plain() -> scenario.Curve:
    return scenario.plain_loop()


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(on_two_ranks, 2)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_ranks(on_four_ranks, 4)


@pytest.fixture
def alone():
    yield processes.start("cpu", 30)
    processes.stop()


def on_two_ranks(ranks: Ranks) -> dict[str, Any]:
    ddp, fsdp = (resolve_layout(strategy, None, None, 2) for strategy in ("ddp", "fsdp"))
    curves = {
        "ddp": scenario.train(scenario.build(ddp)),
        "ddp accumulated": scenario.train(scenario.build(ddp), microbatch=1),
        "fsdp": scenario.train(scenario.build(fsdp)),
        "fsdp on the host": scenario.train(scenario.build(fsdp, offload=True)),
        "fsdp accumulated, unequal": scenario.train(scenario.build(fsdp), microbatch=3),
        "fsdp recomputed, kept": scenario.train(
            scenario.build(fsdp, checkpoint_activations=2, reshard_after_forward=False)
        ),
        "ddp recomputed": scenario.train(scenario.build(ddp, checkpoint_activations=1)),
        "ddp bf16": scenario.train(scenario.build(ddp, precision="bf16")),
        "fsdp bf16": scenario.train(
            scenario.build(fsdp, precision="bf16", checkpoint_activations=1), microbatch=2
        ),
        "silent": scenario.train(never_synchronised(ddp)),
    }
    return {
        "curves": {name: curve.plain() for name, curve in curves.items()},
        "initial": {
            s.strategy: scenario.whole(scenario.build(s).parameters()) for s in (ddp, fsdp)
        },
        "skipped": {s.strategy: skipped_step(s) for s in (ddp, fsdp)},
        "not finite": gradient_not_finite(fsdp, ranks.rank),
        "norms": {s.strategy: norm_against_torch(s) for s in (ddp, fsdp)},
        "gathered": {s.strategy: gathered(s) for s in (ddp, fsdp)},
        "stale": {keep: sampling_after_writing(fsdp, keep) for keep in (True, False)},
        "sampled ddp": whole_output(scenario.build(ddp)),
        "collectives": {parts: collectives(fsdp, microbatch=4 // parts) for parts in (1, 4)},
        "dtypes": dtypes(fsdp),
    }


def on_four_ranks(ranks: Ranks) -> dict[str, Any]:
    fsdp, hsdp = resolve_layout("fsdp", None, None, 4), resolve_layout("hsdp", 2, 2, 4)
    curves = {
        "fsdp": scenario.train(scenario.build(fsdp)),
        "hsdp": scenario.train(scenario.build(hsdp)),
        "hsdp accumulated": scenario.train(scenario.build(hsdp), microbatch=1),
    }
    engine = scenario.build(fsdp)
    return {
        "curves": {name: curve.plain() for name, curve in curves.items()},
        "initial": {
            s.strategy: scenario.whole(scenario.build(s).parameters()) for s in (fsdp, hsdp)
        },
        "held": {name: local_part(p).shape[0] for name, p in engine.parameters().items()},
        "norms": {s.strategy: norm_against_torch(s) for s in (fsdp, hsdp)},
        "gathered": {s.strategy: gathered(s) for s in (fsdp, hsdp)},
        "skipped": {"hsdp": skipped_step(hsdp)},
        "mixed": mixed_meshes(hsdp),
        "data ranks": [scenario.build(s).data_rank for s in (fsdp, hsdp)],
    }


def never_synchronised(layout: Layout) -> Any:
    """The mistake that the law must catch: gradients that never travel."""
    engine = scenario.build(layout)
    synchronising = engine._synchronising
    engine._synchronising = lambda last: synchronising(False)  # type: ignore[method-assign]
    return engine


def skipped_step(layout: Layout) -> dict[str, Any]:
    """Two steps and one between them that is skipped, against two steps."""
    engine, undisturbed = scenario.build(layout), scenario.build(layout)
    for each in (engine, undisturbed):
        scenario.train(each, steps=1)
    held = engine.parameters() | engine.optimizer_tensors()
    before = {name: local_part(tensor).detach().clone() for name, tensor in held.items()}
    scenario.backward(engine, 1)
    for parameter in engine.parameters().values():
        local_part(parameter.grad)[...] = torch.nan
    engine.step(0.1, torch.ones(()))
    after = {name: local_part(tensor).detach().clone() for name, tensor in held.items()}
    for each in (engine, undisturbed):
        scenario.backward(each, 1)
        each.step(0.1, torch.zeros(()))
    same = whole_equal(engine.parameters(), undisturbed.parameters())
    return {
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "steps": sorted({float(t) for n, t in after.items() if n.endswith(".step")}),
        "goes on the same": same,
        "moved": not torch.equal(after["final.out.bias"], local_part(held["final.out.bias"]))
        or local_part(held["final.out.bias"]).numel() == 0,
    }


def whole_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(local_part(ours[n]), local_part(theirs[n])) for n in theirs)


def gradient_not_finite(layout: Layout, rank: int) -> float:
    """The norm seen here when one number on the last rank alone is infinite."""
    engine = scenario.build(layout)
    scenario.backward(engine, 0)
    if rank == layout.world_size - 1:
        gradient = engine.parameters()["final.out.weight"].grad
        assert gradient is not None
        local_part(gradient)[0, 0] = torch.inf
    return float(engine.clip_gradients(1.0))


def norm_against_torch(layout: Layout) -> dict[str, Any]:
    """Ours on the pieces, PyTorch's on whole copies of the same gradients; then after clipping."""
    engine = scenario.build(layout)
    scenario.train(engine, steps=2)
    scenario.backward(engine, 2)
    gradients = scenario.whole({n: p.grad for n, p in engine.parameters().items()})
    expected = torch.nn.utils.get_total_norm(gradients.values())
    norm = engine.clip_gradients(float(expected) / 3)
    clipped = scenario.whole({n: p.grad for n, p in engine.parameters().items()})
    return {
        "norm": scenario.relative(norm, expected),
        "clipped": scenario.distance(clipped, {n: g / 3 for n, g in gradients.items()}),
    }


def gathered(layout: Layout) -> dict[str, Tensor]:
    """Numbers, flags and pairs that say which data rank they are from, as every rank sees them."""
    engine = scenario.build(layout)
    own = torch.arange(3) + 10 * engine.data_rank
    pairs = torch.stack([own.float(), -own.float()]).T  # not contiguous
    values = {"int": own, "bool": own > 10, "float": pairs}
    return {name: engine.gather_over_data(value) for name, value in values.items()}


def mixed_meshes(layout: Layout) -> dict[str, Any]:
    """Gradients cut over both axes, over either, over none, and plain ones, in one norm."""
    mesh = build_mesh(layout, scenario.CPU)["replicate", "shard"]
    torch.manual_seed(0)
    cases = {
        "both": [Shard(0), Shard(1)],
        "outer": [Shard(0), Replicate()],
        "inner": [Replicate(), Shard(1)],
        "none": [Replicate(), Replicate()],
        "plain": None,
    }
    parameters, copies = [], []
    for placements in cases.values():
        whole, gradient = torch.randn(5, 7), torch.randn(5, 7)
        if placements is not None:
            parameter = torch.nn.Parameter(distribute_tensor(whole, mesh, placements))
            parameter.grad = distribute_tensor(gradient, mesh, placements)
        else:
            parameter = torch.nn.Parameter(whole)
            parameter.grad = gradient.clone()
        parameters.append(parameter)
        copies.append(gradient.clone())
    inner = torch.nn.Parameter(distribute_tensor(torch.randn(3), mesh["shard"], [Shard(0)]))
    gradient = torch.randn(3)
    inner.grad = distribute_tensor(gradient, mesh["shard"], [Shard(0)])
    parameters.append(inner)
    copies.append(gradient)
    expected = torch.nn.utils.get_total_norm(copies)
    error = scenario.relative(gradient_norm(parameters), expected)
    clip_gradients(parameters, 0.5)
    scaled = scenario.whole({str(i): p.grad for i, p in enumerate(parameters)})
    return {
        "norm": error,
        "clipped": scenario.distance(
            scaled, {str(i): g * 0.5 / expected for i, g in enumerate(copies)}
        ),
    }


def probe() -> dict[str, Tensor]:
    batch = scenario.global_batch(99)
    return {"x": batch.image, "t": torch.linspace(0.1, 0.9, len(batch)), "label": batch.label}


def whole_output(engine: Any) -> Tensor:
    scenario.train(engine, steps=2)
    return engine.run(lambda model: model(**probe()), whole=False)


def sampling_after_writing(layout: Layout, reshard_after_forward: bool) -> dict[str, Any]:
    """Sample, write the weights in place as averaged weights are swapped in, sample, train on."""
    engine = scenario.build(layout, reshard_after_forward=reshard_after_forward)
    first = whole_output(engine)
    with torch.no_grad():
        for parameter in engine.parameters().values():
            local_part(parameter).mul_(0.5)
    second = engine.run(lambda model: model(**probe()), whole=False)
    model = scenario.single_device_model()
    model.load_state_dict(scenario.whole(engine.parameters()))
    scenario.backward(engine, 3)
    with torch.no_grad():
        expected = model(**probe())
    return {
        "first": first,
        "error": float((second - expected).norm() / expected.norm()),
        "gradients": all(p.grad is not None for p in engine.parameters().values()),
    }


class Collectives(TorchDispatchMode):
    """Counts gathers of weights and reductions of gradients."""

    def __init__(self):
        super().__init__()
        self.counts = {"allgather": 0, "reduce_scatter": 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for name in self.counts:
            self.counts[name] += name in str(func)
        return func(*args, **(kwargs or {}))


def collectives(layout: Layout, microbatch: int) -> dict[str, int]:
    engine = scenario.build(layout)
    scenario.backward(engine, 0)
    engine.step(0.0, torch.zeros(()))
    with Collectives() as counted:
        scenario.backward(engine, 1, microbatch)
    return counted.counts


def dtypes(layout: Layout) -> list[str]:
    """Of weights, gradients and optimizer state under bfloat16."""
    engine = scenario.build(layout, precision="bf16")
    scenario.backward(engine, 0)
    gradients = [p.grad for p in engine.parameters().values()]
    held = [*engine.parameters().values(), *engine.optimizer_tensors().values(), *gradients]
    return sorted({str(tensor.dtype) for tensor in held if tensor is not None})


def close(curve: dict[str, Any], plain: scenario.Curve, tolerance: float) -> None:
    errors = {
        "loss": scenario.relative(curve["losses"], plain.losses),
        "norm": scenario.relative(curve["norms"], plain.norms),
        "weights": scenario.distance(curve["weights"], plain.weights),
    }
    assert max(errors.values()) <= tolerance, errors


@pytest.mark.parametrize("strategy", ["none", "fsdp"])
def test_one_rank_trains_as_the_plain_loop_does(plain, alone, strategy):
    layout = resolve_layout(strategy, None, None, 1)
    close(scenario.train(scenario.build(layout)).plain(), plain, EXACT)


def test_the_run_is_one_that_could_differ(plain):
    assert plain.losses[-3:].mean() < 0.9 * plain.losses[:3].mean()
    assert (plain.norms > scenario.MAX_NORM).any(), "clipping is never active"
    moved = scenario.distance(plain.weights, scenario.first_weights())
    assert moved > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        "ddp accumulated",
        "ddp recomputed",
        "fsdp",
        "fsdp on the host",
        "fsdp accumulated, unequal",
        "fsdp recomputed, kept",
    ],
)
def test_two_ranks_train_as_one_does(plain, two, name):
    for result in two:
        close(result["curves"][name], plain, EXACT)


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "hsdp accumulated"])
def test_four_ranks_train_as_one_does(plain, four, name):
    for result in four:
        close(result["curves"][name], plain, EXACT)


def test_the_law_notices_gradients_that_never_travel(plain, two):
    curve = two[0]["curves"]["silent"]
    assert scenario.relative(curve["losses"], plain.losses) > 100 * EXACT
    assert scenario.distance(curve["weights"], plain.weights) > 100 * EXACT


@pytest.mark.parametrize("name", ["ddp bf16", "fsdp bf16"])
def test_bf16_stays_near_fp32(plain, two, name):
    curve = two[0]["curves"][name]
    assert scenario.relative(curve["losses"], plain.losses) <= BF16
    # It did compute in bfloat16.
    assert scenario.relative(curve["losses"], plain.losses) > EXACT


def test_bf16_keeps_weights_gradients_and_state_in_float32(two):
    assert two[0]["dtypes"] == ["torch.float32"]


def test_first_weights_are_bit_equal_on_every_layout(two, four):
    expected = scenario.first_weights()
    for result in (*two, *four):
        for weights in result["initial"].values():
            assert weights.keys() == expected.keys()
            different = [n for n in expected if not torch.equal(weights[n], expected[n])]
            assert not different


def test_four_ranks_hold_unequal_and_empty_pieces(four):
    assert [result["held"]["label.weight"] for result in four] == [2, 2, 2, 0]
    assert [result["held"]["final.out.bias"] for result in four] == [3, 3, 3, 0]


def test_norm_and_clipping_equal_those_of_whole_gradients(two, four):
    for result in (*two, *four):
        for errors in result["norms"].values():
            assert errors["norm"] <= 1e-6
            assert errors["clipped"] <= 1e-5  # the 1e-6 in the divisor, as in PyTorch


def test_norm_is_right_over_several_meshes(four):
    for result in four:
        assert result["mixed"]["norm"] <= 1e-6
        assert result["mixed"]["clipped"] <= 1e-6


def test_every_rank_sees_a_norm_that_is_not_finite(two):
    assert [result["not finite"] for result in two] == [float("inf")] * 2


def test_a_skipped_step_leaves_no_trace(two, four):
    for result in (*two, *four):
        for seen in result["skipped"].values():
            assert seen == {
                "changed": [],
                "steps": [1.0],
                "goes on the same": True,
                "moved": True,
            }


def test_sampling_sees_the_weights_as_they_are_now(two):
    for keep in (True, False):
        for result in two:
            assert result["stale"][keep]["error"] <= 1e-6
            assert result["stale"][keep]["gradients"]
            torch.testing.assert_close(
                result["stale"][keep]["first"], two[0]["sampled ddp"], rtol=1e-5, atol=1e-6
            )


def test_gradients_travel_once_however_many_microbatches(two):
    """Weights are gathered for each forward, and for each backward but the rest of the model."""
    blocks = scenario.CONFIG.depth
    for parts, counts in two[0]["collectives"].items():
        assert counts == {"allgather": parts * (2 * blocks + 1), "reduce_scatter": blocks + 1}


def test_data_ranks_are_numbered(four):
    assert [result["data ranks"] for result in four] == [[rank, rank] for rank in range(4)]


def test_samples_are_gathered_in_the_order_of_data_ranks(two, four):
    for results in (two, four):
        expected = (torch.arange(3) + 10 * torch.arange(len(results))[:, None]).flatten()
        for result in results:
            for values in result["gathered"].values():
                assert torch.equal(values["int"], expected)
                assert torch.equal(values["bool"], expected > 10)
                assert torch.equal(values["float"], torch.stack([expected, -expected], 1).float())


def test_one_rank_gathers_its_own(alone):
    values = gathered(resolve_layout("none", None, None, 1))
    assert torch.equal(values["int"], torch.arange(3))


def test_state_exists_before_the_first_step_and_speaks_canonical_names(alone):
    engine = scenario.build(resolve_layout("none", None, None, 1), checkpoint_activations=1)
    names = set(scenario.first_weights())
    assert set(engine.parameters()) == names
    state = engine.optimizer_tensors()
    assert set(state) == {
        f"{n}.{slot}" for n in names for slot in ("step", "exp_avg", "exp_avg_sq")
    }
    assert all(not tensor.any() for tensor in state.values())
    # Loading writes in place: what is written is what the next step uses.
    state["final.out.bias.exp_avg"].fill_(1.0)
    before = engine.parameters()["final.out.bias"].detach().clone()
    scenario.backward(engine, 0)
    engine.step(1e-3, torch.zeros(()))
    assert (engine.parameters()["final.out.bias"] < before).all()


def test_an_optimizer_that_cannot_skip_is_refused(alone, monkeypatch):
    monkeypatch.setattr(
        scenario, "adamw", lambda named: torch.optim.AdamW([p for _, p in named], foreach=True)
    )
    with pytest.raises(TypeError, match="fused"):
        scenario.build(resolve_layout("none", None, None, 1))


def compiled_on_two_ranks(ranks: Ranks) -> dict[str, Any]:
    fsdp = resolve_layout("fsdp", None, None, 2)
    engine = scenario.build(fsdp, compile=True, checkpoint_activations=1)
    curve = scenario.train(engine).plain()
    return curve | {
        "sampled": engine.run(lambda model: model(**probe()), whole=False).isfinite().all().item()
    }


@pytest.mark.slow
def test_compiled_blocks_train_as_the_plain_loop_does(plain):
    for curve in run_ranks(compiled_on_two_ranks, 2, timeout=250.0):
        assert curve["sampled"]
        close(curve, plain, EXACT)
