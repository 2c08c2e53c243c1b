"""Networks of experts: no split of the batch and no interruption changes a loss, a balance or a count."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.trainer import families, runs
from trainer.recipe import override_recipe

EXACT = 1e-5
CAPACITY = "model.capacity=1.0"
LAYOUTS = {
    "whole": [],
    "accumulated recomputed": ["train.microbatch=3", "train.checkpoint_activations=1"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    """In this process, with a checkpoint half-way."""
    folders = {name: tmp_path_factory.mktemp("mixture") / "run" for name in LAYOUTS}
    half = f"checkpoint.every={families.STEPS // 2}"
    for name, changes in LAYOUTS.items():
        recipe = families.recipe("dit_moe", folders[name])
        runs.train_here(override_recipe(recipe, [half, CAPACITY, "sample.every=0", *changes]))
    return folders


def experts(folder: Path) -> list[dict]:
    return [line["experts"] for line in runs.lines(folder)]


def test_microbatches_and_recomputing_change_nothing(trained):
    whole, cut = (trained[name] for name in LAYOUTS)
    for key in ("loss", "grad_norm"):
        assert runs.relative(runs.series(cut, key), runs.series(whole, key)) <= EXACT
    ours, theirs = runs.tensors(cut), runs.tensors(whole)
    for part in ("model.", "ema.", "optimizer.", "buffer."):
        assert runs.distance(ours, theirs, part) <= EXACT, part
    for one, other in zip(experts(cut), experts(whole), strict=True):
        assert one["load"] == other["load"]
        assert one["load_by_time"] == other["load_by_time"]
        assert one["dropped"] == other["dropped"]
        assert one["entropy"] == pytest.approx(other["entropy"], rel=EXACT)


def test_what_is_told_of_experts_is_what_happened(trained):
    told = experts(trained["whole"])
    for line in told:
        for shares in line["load"].values():
            assert sum(shares) == pytest.approx(1.0)
        assert 0 < line["dropped"] < 0.5
        assert all(1.0 <= imbalance <= 8.0 for imbalance in line["imbalance"])
        assert line["ties"] == 0
    last = runs.tensors(trained["whole"])
    for layer in range(2):
        router = f"buffer.blocks.{layer}.mixture.router"
        share = torch.tensor(told[-1]["load"][f"layer_{layer}"])
        assert torch.allclose(last[f"{router}.share"], share)
        # At most one step of the rate for each step of training, and some of them were taken.
        assert 0 < last[f"{router}.bias"].abs().max() <= 2e-3 * families.STEPS
    with Image.open(trained["whole"] / "experts.png") as picture:
        assert len(set(picture.convert("RGB").getdata())) > 50


def test_an_interrupted_run_goes_on_with_its_balance(trained):
    """Bit by bit: from the checkpoint half-way to the same end."""
    folder = trained["whole"]
    ends, told = runs.tensors(folder), experts(folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{families.STEPS:08d}")
    half = f"checkpoint.every={families.STEPS // 2}"
    recipe = families.recipe("dit_moe", folder)
    runs.train_here(override_recipe(recipe, [half, CAPACITY, "sample.every=0"]))
    assert runs.different(runs.tensors(folder), ends) == []
    assert experts(folder) == told
