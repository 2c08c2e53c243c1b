"""A checkpoint belongs to the run: whichever engine saved it, any other goes on from it.

Two processes build every two-rank layout in turn; the process of the test is the layout of one rank.
A run is saved in its middle under one layout and goes on under another, and must end as the run of
one device that was never stopped: losses, weights, both moments and counts of Adam, both averages, what
routers of experts carry.
"""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.models.dit_moe import DiTMoE
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.family import persistent_buffers
from parallel import processes
from parallel.engines.engine import Engine
from parallel.engines.pipelined import PipelinedEngine
from parallel.mesh import resolve_layout
from parallel.pieces import FlatPiece
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario
from trainer.checkpoints.manifest import TensorEntry, read_manifest
from trainer.checkpoints.store import load, save
from trainer.ema import Ema
from trainer.routing import rebalance_routers, sum_routing

pytestmark = [
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("accelerate", "deepspeed")),
        reason="deepspeed or accelerate is not installed",
    ),
    pytest.mark.timeout(600),
]

EXACT = 1e-5
MIDDLE, END = 6, 16
DECAYS = [0.5, 0.9]
# Awkward sizes, as in `scenario.CONFIG`, and everything that routers carry.
CONFIG = DiTMoEConfig(
    image_size=9, channels=1, classes=5, patch=3, width=24, depth=2, heads=2, experts=4,
    expert_hidden=16, shared_hidden=16, capacity=1.0, z_weight=0.001, bias_rate=0.001, recurrent=8,
)  # fmt: skip
# Small parameters are cut as well.
CUT = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
MICROBATCH = 2  # of pipelines


def network() -> nn.Module:
    with torch.device("meta"):
        return DiTMoE(CONFIG)


def plain(ranks: int, strategy: Any = None, **axes: int) -> Engine:
    return scenario.build(resolve_layout(strategy, None, None, ranks, **axes), network=network)


def staged(ranks: int, schedule: str) -> Engine:
    layout = resolve_layout(None, None, None, ranks, pp=2)
    return scenario.build_staged(layout, schedule, MICROBATCH, network=network)


def zero(stage: int, json: dict[str, Any] | None = None) -> Engine:
    return scenario.build_zero(stage, json=json, network=network)


TWO: dict[str, Callable[[], Engine]] = {
    "ddp x2": lambda: plain(2, "ddp"),
    "fsdp x2": lambda: plain(2, "fsdp"),
    "tp x2": lambda: plain(2, tp=2),
    "ep x2": lambda: plain(2, ep=2),
    "pp x2": lambda: staged(2, "bitpipe"),
    "zero-1 x2": lambda: zero(1),
    "zero-2 x2": lambda: zero(2),
    "zero-3 x2": lambda: zero(3, CUT),
    "accelerate fsdp x2": lambda: scenario.build_accelerated("fsdp", network=network),
}
FOUR: dict[str, Callable[[], Engine]] = {
    "fsdp x4": lambda: plain(4, "fsdp"),
    "hsdp 2x2": lambda: plain(4, "hsdp"),
    "tp 2 x fsdp 2": lambda: plain(4, "fsdp", tp=2),
    "ep 2 x fsdp 2": lambda: plain(4, ep=2),
    "pp 2 x fsdp 2": lambda: staged(4, "1f1b"),
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
    ("ep x2", "pp 2 x fsdp 2"),
    ("pp x2", "ep 2 x fsdp 2"),
    ("tp x2", "ep x2"),
    ("ep x2", "pp x2"),
}


class Run:
    """One engine with its averages, at some step."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.ema = engine, Ema(engine.parameters(), DECAYS)

    def train(self, first: int, last: int) -> Tensor:
        """(last - first,) losses"""
        engine, losses, skip = self.engine, [], torch.zeros(())
        staged = isinstance(engine, PipelinedEngine)
        microbatch = MICROBATCH if staged else scenario.GLOBAL_BATCH
        for step in range(first, last):
            result = scenario.forward_backward(engine, step, microbatch)
            losses.append(engine.sum_over_data(result.loss.sum()) / scenario.GLOBAL_BATCH)
            engine.clip_gradients(scenario.MAX_NORM)
            engine.step(scenario.LEARNING_RATE, skip)
            routing = sum_routing(result, engine.sum_over_data)
            assert routing is not None
            rebalance_routers(engine, routing, skip)
            self.ema.update(self.engine.parameters(), skip, step)
        return torch.stack(losses)

    def tensors(self) -> dict[str, Any]:
        buffers = persistent_buffers(self.engine.outline())
        return {
            **{f"buffer.{name}": value for name, value in buffers.items()},
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
        losses, held = self.train(MIDDLE, END), scenario.whole(self.tensors())
        # Ranks of a pipeline hold different names.
        everywhere: list[dict[str, Tensor]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everywhere, held)
        return {"losses": losses, "held": {n: t for part in everywhere for n, t in part.items()}}


def at(folder: Path) -> Path:
    return folder / f"step-{MIDDLE:08d}"


def alone_engine() -> Engine:
    return plain(1)


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
    run = Run(zero(2)).load(folder / "1")
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
    """Relative differences of losses, weights, what routers carry, averages, moments and counts."""
    ours, theirs = ended["held"], whole["held"]
    assert ours.keys() == theirs.keys()
    errors = {"losses": scenario.relative(ended["losses"], whole["losses"])}
    for part in ("model.", "buffer.", *(f"ema.{decay}." for decay in DECAYS)):
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
    assert layouts["pp x2"] == "2 ranks"
    assert layouts["accelerate fsdp x2"].startswith("2 ranks, mesh ")
    assert all(layouts[f"zero-{stage} x2"] == "2 ranks, cut flat" for stage in (1, 2, 3))
    entries = {name: manifest.tensors for name, manifest in written.items()}
    assert all(entries[name].keys() == entries["1"].keys() for name in ALL)
    boxes = boxes_of(entries, "optimizer.blocks.1.attention.qkv.weight.exp_avg")
    assert boxes["1"] == boxes["ddp x2"] == boxes["pp x2"] == 1
    assert boxes["tp x2"] == 6  # two shares each of queries, keys and values
    assert boxes["zero-3 x2"] == boxes["fsdp x2"] == boxes["hsdp 2x2"] == boxes["ep x2"] == 2
    assert boxes["fsdp x4"] == boxes["ep 2 x fsdp 2"] == 4
    assert boxes["tp 2 x fsdp 2"] >= 6
    assert boxes["pp 2 x fsdp 2"] == 2
    boxes = boxes_of(entries, "optimizer.blocks.1.mixture.experts.up.exp_avg")
    assert boxes["ep x2"] == boxes["pp 2 x fsdp 2"] == 2
    assert boxes["ep 2 x fsdp 2"] == 4


def boxes_of(entries: dict[str, dict[str, TensorEntry]], name: str) -> dict[str, int]:
    return {layout: len(held[name].chunks) for layout, held in entries.items()}


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
