"""The layout law for experts over ranks: all that one rank computes, balance and samples as well."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flows.errors import UserError
from parallel import expert
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.trainer import families, runs, ties
from trainer import metrics_log
from trainer.assembly import plan
from trainer.recipe import override_recipe

pytestmark = pytest.mark.timeout(600)

EXACT = 1e-5
CAPACITY, TRACED = "model.capacity=1.0", "train.trace_experts=4"
MOVED = "ep4 after one rank"
# Sequences are cut: nothing may compare all tokens of one. Held against one rank without a capacity.
UNBOUND = ["model.capacity=0", "model.balance=sequence"]
PRODUCTS = ["train.checkpoint_activations=1", "train.checkpoint_keeps=products"]
# ranks -> name: changes
LAYOUTS: dict[int, dict[str, list[str]]] = {
    2: {
        "ep2 products": ["parallel.ep=2", *PRODUCTS],
    },
    4: {
        "ep4": ["parallel.ep=4"],
        MOVED: ["parallel.ep=4"],
        "fsdp4 ep2": ["parallel.ep=2", "train.microbatch=1", "train.checkpoint_activations=1"],
        "fsdp2 cp2 ep2": ["parallel.ep=2", "parallel.cp=2", *UNBOUND],
    },
}
MORE_LAYOUTS: dict[int, dict[str, list[str]]] = {
    2: {
        "fsdp2 ep2": ["parallel.ep=2", "train.microbatch=3"],
    },
    4: {
        "hsdp 2x2 ep2": ["parallel.ep=2", "parallel.strategy=hsdp", "parallel.replicate=2"],
        "tp2 ep2": ["parallel.ep=2", "parallel.tp=2"],
        "cp2 ep4 ring": ["parallel.ep=4", "parallel.cp=2", "parallel.context=ring", *UNBOUND],
    },
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]
MORE_NAMES = [name for layouts in MORE_LAYOUTS.values() for name in layouts]


def recipe(folder: Path, changes: list[str]):
    every = f"checkpoint.every={families.HALF}"
    return override_recipe(families.recipe("dit_moe", folder), [CAPACITY, TRACED, every, *changes])


def train_all(ranks: Ranks, folder: str, layouts: dict[str, list[str]]) -> int:
    """Every layout in turn, in one process group."""
    for name, changes in layouts.items():
        place = Path(folder, name)
        made = plan(recipe(place, changes), ranks.world_size)
        runs.train_as_rank(made, ranks)
    return len(layouts)


def trained(folder: Path, by_ranks: dict[int, dict[str, list[str]]]) -> Path:
    for ranks, layouts in by_ranks.items():
        patience = 60.0 * (1 + len(layouts))
        run_ranks(train_all, ranks, timeout=patience, folder=str(folder), layouts=layouts)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Of the runs of one rank."""
    folder: Path = tmp_path_factory.mktemp("one")
    for name, changes in {"plain": [], "cut": UNBOUND}.items():
        runs.train_here(recipe(folder / name, changes))
    return folder


@pytest.fixture(scope="module")
def folder(one, tmp_path_factory) -> Path:
    """Of all runs, one of which was begun by one rank."""
    made: Path = tmp_path_factory.mktemp("experts")
    families.stopped(one / "plain", made / MOVED)
    return trained(made, LAYOUTS)


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("more"), MORE_LAYOUTS)


def reference(name: str) -> str:
    """The run of one rank that a layout is held against."""
    return "cut" if "cp2" in name else "plain"


def routing(folder: Path) -> list[dict]:
    return [line["experts"] for line in runs.lines(folder)]


def hold(ours: Path, theirs: Path, *, cut: bool = True) -> None:
    """The law, for what was trained and for what was drawn."""
    ties.check(ours, theirs, EXACT)
    errors = {}
    for key in ("loss", "grad_norm"):
        errors[key] = runs.relative(runs.series(ours, key), runs.series(theirs, key))
    held, whole = runs.tensors(ours), runs.tensors(theirs)
    # Gradients of mixtures are small beside others', and a factor in them would hide.
    depth = len(routing(ours)[0]["imbalance"])
    mixtures = [f"optimizer.blocks.{layer}.mixture." for layer in range(depth)]
    parts = [f"{mixture}{own}" for mixture in mixtures for own in ("experts.", "router.")]
    carried = ["buffer."] if any(name.startswith("buffer.") for name in whole) else []
    for part in ("model.", "ema.", "optimizer.", *carried, *parts):
        errors[part] = runs.distance(held, whole, part)
    assert max(errors.values()) <= EXACT, errors
    for one, other in zip(routing(ours), routing(theirs), strict=True):
        for key in ("load", "load_by_time", "dropped", "imbalance"):
            assert one[key] == other[key], key
        assert one["entropy"] == pytest.approx(other["entropy"], rel=EXACT)
    traces = [metrics_log.read(place / "routing.jsonl") for place in (ours, theirs)]
    assert traces[0] == traces[1]
    assert len(traces[0]) == families.STEPS // 4
    assert ("slices" in runs.manifests(ours)[families.STEPS].layout) == cut
    # Pictures are rounded to whole levels, so that one may fall on the other side.
    assert (drawn(ours) - drawn(theirs)).abs().max() <= 1


def drawn(folder: Path) -> torch.Tensor:
    with np.load(folder / "samples" / f"step-{families.STEPS:08d}.npz") as file:
        return torch.from_numpy(file["images"].astype(np.int64))


@pytest.mark.parametrize("name", NAMES)
def test_experts_over_ranks_train_what_one_rank_trains(folder, one, name):
    hold(folder / name, one / reference(name))


def test_one_rank_goes_on_from_experts_over_ranks(folder, one, tmp_path):
    place = families.stopped(folder / "fsdp4 ep2", tmp_path / "run")
    assert runs.train_here(recipe(place, [])).finished
    hold(place, one / "plain", cut=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_NAMES)
def test_more_layouts_train_what_one_rank_trains(more, one, name):
    hold(more / name, one / reference(name))


def test_a_rank_waits_for_its_device_once_where_rows_travel() -> None:
    """Tensors without memory cannot be asked how many rows they speak of."""
    with FakeTensorMode():
        order = expert._by_expert(torch.tensor([[1, 2, 0], [2, 0, 4]]), 9)
    assert order.shape == (9,)


@pytest.mark.parametrize(
    ("changes", "ranks", "sentence"),
    [
        (["parallel.ep=3"], 3, "parallel.ep = 3 does not divide model.experts = 8; .*1, 2, 4 or 8"),
        (
            ["parallel.ep=4"],
            2,
            r"does not divide the 2 ranks that one copy of the model is cut over .*; it may be 1 or 2, or "
            r"start 4 ranks or a multiple of it\.$",
        ),
        (["parallel.ep=2", "train.compile=true"], 2, "train.compile = true compiles whole blocks"),
        (
            ["parallel.ep=2", "parallel.strategy=ddp"],
            2,
            "parallel.strategy = ddp cuts none; use fsdp",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, changes, ranks, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(recipe(tmp_path, ["train.batch=12", *changes]), ranks)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["parallel.cp=2"], r"parallel\.cp = 2 cuts sequences, and model\.capacity compares"),
        (
            ["parallel.cp=2", "model.capacity=0", "model.bias_rate=0", "model.chooser=experts"],
            r"model\.chooser = experts compares all tokens",
        ),
        (["parallel.tp=2", "parallel.sequence=true"], r"parallel\.sequence = true cuts tokens"),
    ],
)
def test_routers_that_need_whole_sequences_are_not_given_parts(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(recipe(tmp_path, changes), 2)


def test_a_model_without_experts_is_not_traced(tmp_path):
    dense = override_recipe(families.recipe("dit", tmp_path), ["train.trace_experts=4"])
    with pytest.raises(UserError, match=r"train\.trace_experts = 4 counts .* has 0 of these"):
        plan(dense, 1)


@pytest.mark.parametrize("family", ["dit", "jet"])
def test_models_without_experts_are_refused(tmp_path, family):
    dense = override_recipe(families.recipe(family, tmp_path), ["parallel.ep=2"])
    sentence = rf"parallel\.ep = 2 divides experts, and model\.family = {family} has none"
    with pytest.raises(UserError, match=sentence):
        plan(dense, 2)
