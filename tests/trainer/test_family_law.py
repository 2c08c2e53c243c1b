"""The layout law for every model family: two or four shards train, and sample, what one rank does."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.trainer import families, runs
from trainer.assembly import plan
from trainer.run_folder import RunFolder
from trainer.running import train_rank

pytestmark = pytest.mark.timeout(600)

EXACT = 1e-5


def train_all(ranks: Ranks, folder: str) -> int:
    """Every family in turn, in one process group; how many were trained."""
    for name in families.TINY:
        place = Path(folder, name)
        made = plan(families.recipe(name, place), ranks.world_size)
        with ExitStack() as stack:
            assert train_rank(made, RunFolder(place), ranks, runs.Silence(), [], stack).finished
    return len(families.TINY)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[int, Path]:
    """Ranks -> the folder of all families' runs."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2, 4)}
    for ranks, folder in folders.items():
        run_ranks(train_all, ranks, timeout=280.0, folder=str(folder))
    return folders


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", families.TINY)
def test_shards_train_what_one_rank_trains(trained, name, ranks):
    folder, one = trained[ranks] / name, trained[1] / name
    assert f"shard={ranks}" in runs.manifests(folder)[families.STEPS].layout
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


def expert_loads(folder: Path) -> list[dict[str, list[float]]]:
    return [line["experts"]["load_by_time"] for line in runs.lines(folder)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", families.TINY)
def test_shards_draw_what_one_rank_draws(trained, name, ranks):
    shown = []
    for count in (1, ranks):
        picture = trained[count] / name / "samples" / f"step-{families.STEPS:08d}.npz"
        with np.load(picture) as file:
            shown.append(torch.from_numpy(file["images"].astype(np.int64)))
    # Pictures are rounded to whole levels, so that one may fall on the other side.
    assert (shown[0] - shown[1]).abs().max() <= 1
    assert shown[0].double().std() > 1.0
