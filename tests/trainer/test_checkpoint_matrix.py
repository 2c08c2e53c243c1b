"""A checkpoint belongs to the run: whichever engine saved it, any other goes on from it.

Two processes build every two-rank layout in turn; the process of the test is the layout of one rank.
A run is saved in its middle under one layout and goes on under another, and must end as the run of
one device that was never stopped: losses, weights, both moments and counts of Adam, both averages.
"""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel import processes
from parallel.engines.engine import Engine
from parallel.mesh import resolve_layout
from parallel.pieces import FlatPiece
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario
from trainer.checkpoints.manifest import read_manifest
from trainer.checkpoints.store import load, save
from trainer.ema import Ema

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("accelerate", "deepspeed")),
        reason="deepspeed or accelerate is not installed",
    ),
    pytest.mark.timeout(600),
]

EXACT = 1e-5
MIDDLE, END = 10, 20
DECAYS = [0.5, 0.9]
# Small parameters are cut as well.
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
TWO = {
    "ddp x2": lambda: scenario.build(resolve_layout("ddp", None, None, 2)),
    "fsdp x2": lambda: scenario.build(resolve_layout("fsdp", None, None, 2)),
    "tp x2": lambda: scenario.build(resolve_layout(None, None, None, 2, tp=2)),
    "zero-1 x2": lambda: scenario.build_zero(1),
    "zero-2 x2": lambda: scenario.build_zero(2),
    "zero-3 x2": lambda: scenario.build_zero(3, json=CUT),
    "accelerate fsdp x2": lambda: scenario.build_accelerated("fsdp"),
}
FOUR = {
    "fsdp x4": lambda: scenario.build(resolve_layout("fsdp", None, None, 4)),
    "hsdp 2x2": lambda: scenario.build(resolve_layout("hsdp", 2, 2, 4)),
    "tp 2 x fsdp 2": lambda: scenario.build(resolve_layout("fsdp", None, None, 4, tp=2)),
}
OF: dict[int, dict[str, Callable[[], Engine]]] = {1: {"1": lambda: alone_engine()}, 2: TWO, 4: FOUR}
ALL = [name for layouts in OF.values() for name in layouts]

# Every layout saves once and goes on once, beside the pairs with one rank.
FAST = {
    ("fsdp x2", "tp 2 x fsdp 2"),
    ("tp x2", "hsdp 2x2"),
    ("zero-3 x2", "fsdp x4"),
    ("ddp x2", "zero-3 x2"),
    ("zero-3 x2", "fsdp x2"),
    ("fsdp x2", "zero-1 x2"),
    ("zero-1 x2", "accelerate fsdp x2"),
    ("accelerate fsdp x2", "zero-2 x2"),
    ("zero-2 x2", "tp x2"),
    ("tp x2", "ddp x2"),
}


class Run:
    """One engine with its averages, at some step."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ema = engine, Ema(engine.parameters(), DECAYS)

    def train(self, first: int, last: int) -> Tensor:
        """(last - first,) losses"""
        losses = []
        for step in range(first, last):
            losses.append(scenario.backward(self.engine, step))
            self.engine.clip_gradients(scenario.MAX_NORM)
            skip = torch.zeros(())
            self.engine.step(scenario.LEARNING_RATE, skip)
            self.ema.update(self.engine.parameters(), skip, step)
        return torch.stack(losses)

    def tensors(self) -> dict[str, Any]:
        return {
            **{f"model.{name}": held.detach() for name, held in self.engine.parameters().items()},
            **{f"optimizer.{n}": held for n, held in self.engine.optimizer_tensors().items()},
            **{f"ema.{name}": held for name, held in self.ema.tensors().items()},
        }

    def save(self, folder: Path) -> None:
        save(folder, step=MIDDLE, tensors=self.tensors(), state={"step": MIDDLE}, keep=1)

    def load(self, folder: Path) -> "Run":
        assert load(at(folder), self.tensors()) == {"step": MIDDLE}
        return self

    def ends(self) -> dict[str, Any]:
        """From the middle to the end: losses, and everything that is held then."""
        return {"losses": self.train(MIDDLE, END), "held": scenario.whole(self.tensors())}


def at(folder: Path) -> Path:
    return folder / f"step-{MIDDLE:08d}"


def alone_engine() -> Engine:
    return scenario.build(resolve_layout("none", None, None, 1))


def alone() -> Run:
    return Run(alone_engine())


def closed(run: Run) -> None:
    """DeepSpeed's hooks and buffers, which are many."""
    inner = getattr(run.engine, "_inner", None)
    if inner is not None:
        inner.destroy()


def save_all(ranks: Ranks, folder: Path) -> None:
    """A checkpoint of the middle under every layout of so many ranks."""
    for name, build in OF[ranks.world_size].items():
        run = Run(build())
        run.train(0, MIDDLE)
        run.save(folder / name)
        closed(run)


def go_on(ranks: Ranks, folder: Path, pairs: set[tuple[str, str]]) -> dict[str, Any]:
    """How runs end that go on from checkpoints of other layouts."""
    ended = {}
    for name, build in OF[ranks.world_size].items():
        for source in [source for source in ALL if (source, name) in pairs]:
            run = Run(build()).load(folder / source)
            ended[f"{source} -> {name}"] = run.ends()
            closed(run)
    return ended


def save_and_go_on(ranks: Ranks, folder: Path, pairs: set[tuple[str, str]]) -> dict[str, Any]:
    save_all(ranks, folder)
    ended = go_on(ranks, folder, pairs)
    if ranks.world_size == 2:
        ended["without moments"] = forgetful(folder)
    return ended


def forgetful(folder: Path) -> dict[str, Any]:
    """How a run ends that goes on without Adam's moments."""
    run = Run(scenario.build_zero(2)).load(folder / "1")
    for name, held in run.engine.optimizer_tensors().items():
        if isinstance(held, FlatPiece):
            held.local.zero_()
        assert isinstance(held, FlatPiece) or name.endswith(".step")
    return run.ends()


@pytest.fixture(scope="module")
def one_rank():
    yield processes.start("cpu", 60)
    processes.stop()


@pytest.fixture(scope="module")
def never_stopped(one_rank, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The run of one rank: a checkpoint of its middle, and how it ended."""
    folder = tmp_path_factory.mktemp("matrix")
    run = alone()
    run.train(0, MIDDLE)
    run.save(folder / "1")
    return folder, run.ends()


@pytest.fixture(scope="module")
def fast(never_stopped) -> dict[str, Any]:
    folder, _ = never_stopped
    pairs = FAST | {("1", name) for name in ALL}
    ended: dict[str, Any] = {}
    for ranks in (2, 4):
        ended |= run_ranks(save_and_go_on, ranks, timeout=500.0, folder=folder, pairs=pairs)[0]
    return ended


def hold(ended: dict[str, Any], whole: dict[str, Any]) -> None:
    errors = differences(ended, whole)
    assert max(errors.values()) <= EXACT, errors


def differences(ended: dict[str, Any], whole: dict[str, Any]) -> dict[str, float]:
    """Relative differences of losses, weights, averages, moments and counts."""
    ours, theirs = ended["held"], whole["held"]
    assert ours.keys() == theirs.keys()
    errors = {"losses": scenario.relative(ended["losses"], whole["losses"])}
    for part in ("model.", *(f"ema.{decay}." for decay in DECAYS)):
        errors[part] = distance(ours, theirs, part, "")
    for slot in (".exp_avg", ".exp_avg_sq", ".step"):
        errors[slot] = distance(ours, theirs, "optimizer.", slot)
    return errors


def distance(ours: Any, theirs: Any, begin: str, end: str) -> float:
    """Relative L2 distance of all tensors with such names, together."""
    names = [name for name in theirs if name.startswith(begin) and name.endswith(end)]
    assert names
    return scenario.distance({n: ours[n] for n in names}, {n: theirs[n] for n in names})


@pytest.mark.parametrize("pair", sorted(FAST), ids=" -> ".join)
def test_any_engine_goes_on_from_any_other(never_stopped, fast, pair):
    hold(fast[" -> ".join(pair)], never_stopped[1])


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_any_engine_goes_on_from_one_rank(never_stopped, fast, name):
    hold(fast[f"1 -> {name}"], never_stopped[1])


@pytest.mark.parametrize("name", [*TWO, *FOUR])
def test_one_rank_goes_on_from_any_engine(never_stopped, fast, name):
    folder, whole = never_stopped
    hold(alone().load(folder / name).ends(), whole)


def test_moments_that_are_dropped_are_noticed(never_stopped, fast):
    _, whole = never_stopped
    with pytest.raises(AssertionError, match="losses"):
        hold(fast["without moments"], whole)
    errors = scenario.relative(fast["without moments"]["losses"], whole["losses"])
    assert errors > 100 * EXACT


def test_checkpoints_were_cut_as_their_engines_cut(never_stopped, fast):
    """Otherwise all of the above would compare one rank with itself."""
    folder, _ = never_stopped
    written = {name: read_manifest(at(folder / name)) for name in ALL}
    layouts = {name: manifest.layout for name, manifest in written.items()}
    assert layouts["1"] == "1 rank"
    assert layouts["ddp x2"] == "2 ranks"
    assert layouts["fsdp x2"].startswith("2 ranks, mesh ")
    assert layouts["tp x2"] == "2 ranks, slices 2"
    assert layouts["accelerate fsdp x2"].startswith("2 ranks, mesh ")
    assert all(layouts[f"zero-{stage} x2"] == "2 ranks, cut flat" for stage in (1, 2, 3))
    entries = {name: manifest.tensors for name, manifest in written.items()}
    assert all(entries[name].keys() == entries["1"].keys() for name in ALL)
    moment = "optimizer.blocks.1.attention.qkv.weight.exp_avg"
    boxes = {name: len(entries[name][moment].chunks) for name in written}
    assert boxes["1"] == boxes["ddp x2"] == 1
    assert boxes["tp x2"] == 6  # two shares each of queries, keys and values
    assert boxes["zero-3 x2"] == boxes["fsdp x2"] == boxes["hsdp 2x2"] == 2
    assert boxes["fsdp x4"] == 4
    assert boxes["tp 2 x fsdp 2"] >= 6


def whole_matrix(folder: Path, whole: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """(saved under, gone on under) -> differences from the run that was never stopped.

    folder: with the checkpoint of one rank
    """
    pairs = {(source, name) for source in ALL for name in ALL}
    for ranks in (2, 4):
        run_ranks(save_all, ranks, timeout=500.0, folder=folder)
    ended: dict[str, Any] = {}
    for ranks in (1, 2, 4):
        ended |= run_ranks(go_on, ranks, timeout=900.0, folder=folder, pairs=pairs)[0]
    return {pair: differences(ended[" -> ".join(pair)], whole) for pair in sorted(pairs)}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_whole_matrix(never_stopped):
    folder, whole = never_stopped
    shutil.copytree(folder / "1", folder / "all" / "1")
    found = whole_matrix(folder / "all", whole)
    assert len(found) == len(ALL) ** 2
    for pair, errors in found.items():
        assert max(errors.values()) <= EXACT, (pair, errors)
