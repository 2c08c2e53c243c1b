"""The layout law for every model family: any layout trains, and samples, what one rank does."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.trainer import families, runs, ties
from trainer.assembly import plan

pytestmark = pytest.mark.timeout(600)

EXACT = 1e-5
NORM = 1e-6


# Name -> ranks, changes of the recipe, and what checkpoints say of the layout.
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one": (1, {}, "1 rank"),
    "fsdp 2": (2, {}, "shard=2"),
    "fsdp 4": (4, {}, "shard=4"),
    "tp 2": (2, {"tp": 2}, "2 ranks, slices 2"),
}
OTHERS = [name for name in LAYOUTS if name != "one"]


def train_all(ranks: Ranks, folder: str, changes: dict[str, Any]) -> int:
    """Every family in turn, in one process group; how many were trained."""
    for name in families.TINY:
        place = Path(folder, name)
        made = plan(families.recipe(name, place, parallel=changes), ranks.world_size)
        runs.train_as_rank(made, ranks)
    return len(families.TINY)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Path]:
    """Layout -> the folder of all families' runs."""

    @cache
    def folder(layout: str) -> Path:
        made, (ranks, changes, _) = tmp_path_factory.mktemp("runs"), LAYOUTS[layout]
        run_ranks(train_all, ranks, timeout=280.0, folder=str(made), changes=changes)
        return made

    return folder


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("name", families.TINY)
def test_every_layout_trains_what_one_rank_trains(trained, name, layout):
    folder, one = trained(layout) / name, trained("one") / name
    assert LAYOUTS[layout][2] in runs.manifests(folder)[families.STEPS].layout
    if name == "dit_moe":
        ties.check(folder, one, EXACT)
    errors = {}
    for key in ("loss", "grad_norm"):
        ours, theirs = runs.series(folder, key), runs.series(one, key)
        # Likelihoods pass through zero, where nothing is relative to them.
        errors[key] = float((ours - theirs).abs().max() / theirs.abs().mean())
    ours, theirs = runs.tensors(folder), runs.tensors(one)
    parts = ["model.", "ema.", "optimizer."]
    if name == "dit_moe":
        assert expert_loads(folder) == expert_loads(one)
        parts.append("buffer.")
    errors |= {part: runs.distance(ours, theirs, part) for part in parts}
    assert max(errors.values()) <= EXACT, errors
    assert errors["grad_norm"] <= NORM, errors


def expert_loads(folder: Path) -> list[dict[str, list[float]]]:
    return [line["experts"]["load_by_time"] for line in runs.lines(folder)]


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("name", families.TINY)
def test_every_layout_draws_what_one_rank_draws(trained, name, layout):
    shown = []
    for kind in ("one", layout):
        picture = trained(kind) / name / "samples" / f"step-{families.STEPS:08d}.npz"
        with np.load(picture) as file:
            shown.append(torch.from_numpy(file["images"].astype(np.int64)))
    # Pictures are rounded to whole levels, so that one may fall on the other side.
    assert (shown[0] - shown[1]).abs().max() <= 1
    assert shown[0].double().std() > 1.0
