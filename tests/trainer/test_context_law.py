"""Sequences cut over ranks train, and sample, what one rank does: every family, both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flows.errors import UserError
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.trainer import families, runs
from trainer.assembly import plan
from trainer.recipe import Recipe

pytestmark = pytest.mark.timeout(900)

EXACT = 1e-5
NORM = 1e-6

Cells = dict[str, dict[str, dict[str, Any]]]

RING = {"cp": 2, "context": "ring"}
FAMILIES = ["dit", "mmdit", "tarflow", "starflow", "jet"]
# Keys to put over those of the recipe of the family that a cell's name begins with.
ONE: Cells = {
    **{name: {} for name in FAMILIES},
    "dit of four heads": {"model": {"heads": 4}},
    "starflow": {"checkpoint": {"every": families.HALF}},
}
TWO: Cells = {
    **{f"{name}, ulysses": {"parallel": {"cp": 2}} for name in FAMILIES},
    "dit, ring, recomputed, in parts": {
        "parallel": RING, "train": {"checkpoint_activations": 1, "microbatch": 3}
    },
    "mmdit, ring": {"parallel": RING},
    "tarflow, ring, copies": {"parallel": RING | {"strategy": "ddp"}},
    "jet, ring": {"parallel": RING},
    "starflow, ring": {"parallel": RING, "checkpoint": {"every": families.HALF}},
    "starflow, ring, after one rank": {"parallel": RING},
}  # fmt: skip
FOUR: Cells = {
    "mmdit, ulysses, fsdp": {"parallel": {"cp": 2, "shard": 2}},
    "starflow, ring, tp": {"parallel": RING | {"tp": 2}},
}
COMPILED: Cells = {
    "mmdit, ulysses, compiled": {"parallel": {"cp": 2}, "train": {"compile": True}},
    "starflow, ring, compiled, recomputed": {
        "parallel": RING, "train": {"compile": True, "checkpoint_activations": 1}
    },
}  # fmt: skip
MORE: Cells = {
    "dit, ring, fsdp": {"parallel": RING | {"shard": 2}},
    "dit of four heads, ulysses, tp, tokens": {
        "model": {"heads": 4}, "parallel": {"cp": 2, "tp": 2, "sequence": True}
    },
    "tarflow, ulysses, fsdp": {"parallel": {"cp": 2, "shard": 2}},
    "starflow, ring, fsdp": {"parallel": RING | {"shard": 2}},
    "jet, ulysses, fsdp": {"parallel": {"cp": 2, "shard": 2}},
    "dit, ulysses, hsdp": {"parallel": {"cp": 2, "strategy": "hsdp", "replicate": 2}},
    "jet, ring, ddp": {"parallel": RING | {"strategy": "ddp"}},
    "dit, ring, tp": {"parallel": RING | {"tp": 2}},
    "mmdit, ring, tp": {"parallel": RING | {"tp": 2}},
    "tarflow, ring, tp, tokens": {"parallel": RING | {"tp": 2, "sequence": True}},
    "jet, ring, tp": {"parallel": RING | {"tp": 2}},
}  # fmt: skip


def recipe(cell: str, folder: Path, keys: dict[str, dict[str, Any]]) -> Recipe:
    made = families.recipe(reference(cell).partition(" ")[0], folder, keys.get("parallel"))
    changed = {
        section: getattr(made, section).model_copy(update=keys.get(section, {}))
        for section in ("model", "train", "checkpoint")
    }
    return made.model_copy(update=changed)


def reference(cell: str) -> str:
    """The cell of one rank that a cell is held against."""
    return cell.partition(",")[0]


def train_cells(ranks: Ranks, folder: str, cells: Cells) -> int:
    """Every cell in turn, in one process group; how many were trained."""
    for cell, keys in cells.items():
        place = Path(folder, cell)
        made = plan(recipe(cell, place, keys), ranks.world_size)
        runs.train_as_rank(made, ranks)
    return len(cells)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The runs of one rank, which all others are held against."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks(train_cells, 1, timeout=280.0, folder=str(folder), cells=ONE)
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    families.stopped(one / "starflow", folder / "starflow, ring, after one rank")
    run_ranks(train_cells, 2, timeout=400.0, folder=str(folder), cells=TWO)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run_ranks(train_cells, 4, timeout=400.0, folder=str(folder), cells=FOUR)
    return folder


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("more")
    run_ranks(train_cells, 4, timeout=800.0, folder=str(folder), cells=MORE)
    return folder


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    run_ranks(train_cells, 2, timeout=800.0, folder=str(folder), cells=COMPILED)
    return folder


def hold(ours: Path, theirs: Path) -> None:
    """All losses, gradient norms, and all that the last checkpoint holds; and the samples."""
    errors = {}
    for key in ("loss", "grad_norm"):
        mine, other = runs.series(ours, key), runs.series(theirs, key)
        assert len(mine) == families.STEPS
        # Likelihoods pass through zero, where nothing is relative to them.
        errors[key] = float((mine - other).abs().max() / other.abs().mean())
    mine, other = runs.tensors(ours), runs.tensors(theirs)
    parts = ("model.", "ema.", "optimizer.")
    errors |= {part: runs.distance(mine, other, part) for part in parts}
    assert max(errors.values()) <= EXACT, errors
    assert errors["grad_norm"] <= NORM, errors
    drawn, others = pictures(ours), pictures(theirs)
    # Pictures are rounded to whole levels, so that one may fall on the other side.
    assert (drawn - others).abs().max() <= 1
    assert drawn.double().std() > 1.0


def pictures(folder: Path) -> torch.Tensor:
    with np.load(folder / "samples" / f"step-{families.STEPS:08d}.npz") as file:
        return torch.from_numpy(file["images"].astype(np.int64))


@pytest.mark.parametrize("cell", TWO)
def test_two_ranks_of_one_sequence_train_and_draw_what_one_rank_does(one, two, cell):
    hold(two / cell, one / reference(cell))


@pytest.mark.parametrize("cell", FOUR)
def test_shares_of_sequences_lie_beside_other_shares(one, four, cell):
    hold(four / cell, one / reference(cell))


@pytest.mark.slow
@pytest.mark.parametrize("cell", MORE)
def test_more_shares_of_sequences_lie_beside_other_shares(one, more, cell):
    hold(more / cell, one / reference(cell))


@pytest.mark.slow
@pytest.mark.parametrize("cell", COMPILED)
def test_compiled_blocks_train_and_draw_what_one_rank_does(one, compiled, cell):
    hold(compiled / cell, one / reference(cell))


@pytest.mark.parametrize(
    ("family", "parallel", "ranks", "says"),
    [
        ("dit", {"cp": 3}, 3, r"parallel.cp = 3 does not divide \(data.image_size / model.patch"),
        (
            "mmdit",
            {"cp": 2, "tp": 2},
            4,
            "parallel.tp x cp = 2 x 2 does not divide model.heads = 2",
        ),
        ("dit", {"cp": 2}, 3, "parallel.cp = 2 does not divide 3 ranks"),
    ],
)
def test_what_cannot_be_cut_is_refused_before_any_rank(tmp_path, family, parallel, ranks, says):
    with pytest.raises(UserError, match=says):
        plan(families.recipe(family, tmp_path, parallel), ranks)


def test_one_rank_goes_on_where_two_ranks_of_one_sequence_stopped(one, two, tmp_path):
    place = families.stopped(two / "starflow, ring", tmp_path / "starflow")
    assert runs.train_here(recipe("starflow", place, {})).finished
    hold(place, one / "starflow")


def test_the_cells_are_what_they_say(one, two, four):
    """Otherwise all of the above would compare one rank with itself."""
    for folder, cells in ((two, TWO), (four, FOUR)):
        for cell in cells:
            written = runs.manifests(folder / cell)[families.STEPS].layout
            assert written.startswith(f"{2 if folder is two else 4} ranks"), written
    assert runs.manifests(one / "dit")[families.STEPS].layout == "1 rank"
