"""The comparison of loaders compares like with like, and counts what it says."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.loader import Row, judge
from benchmarks.loader_apart import TOLERANCE, check_images
from benchmarks.loader_shards import make_shards
from benchmarks.loader_sides import (
    SIDES,
    Dali,
    Energon,
    Flowmill,
    FlowmillPillow,
    Setting,
    WebDataset,
)

SETTING = Setting(batch=4, workers=2)
NAMES = [kind.name for kind in SIDES]


@pytest.fixture(autouse=True)
def _own_index_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path / "shards", samples=64, size=32, shards=4)


def made(kind, shards):
    try:
        return kind(shards, SETTING)
    except ImportError as error:
        pytest.skip(f"{kind.name} is not installed: {error}")


@pytest.mark.parametrize("kind", SIDES, ids=NAMES)
def test_every_side_hands_over_the_same_images_and_goes_on_where_it_was(kind, shards):
    side = made(kind, shards)
    assert check_images(side, shards) <= TOLERANCE
    running = side.open(None)
    batches = list(itertools.islice(running, 7))
    running.close()
    for images, labels in batches:
        assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
        assert images.is_contiguous()
        assert labels.shape == (4,)
    # Energon reads few shards several times at once, and so some samples again before others.
    if kind is not Energon:
        assert len({n for _, labels in batches for n in labels.tolist()}) == 28
    resumed = side.open(side.state_after(6))
    _, labels = next(resumed)
    resumed.close()
    assert labels.tolist() == batches[6][1].tolist()


def test_a_side_with_other_images_is_caught(shards):
    class Cheat(FlowmillPillow):
        def open(self, state):
            for images, labels in super().open(state):
                yield images.flip(0), labels

    with pytest.raises(ValueError, match="an image differs by"):
        check_images(Cheat(shards, SETTING), shards)


def test_goals_are_ratios_of_the_best_of_ours_to_the_others():
    rows = [
        Row(Flowmill.name, "", 900.0, 0.05, 0.0),
        Row(FlowmillPillow.name, "", 600.0, 0.01, 0.0),
        Row(WebDataset.name, "", 500.0, 7.5, 0.0),
        Row(Dali.name, "", 1000.0, 0.05, 0.0),
        Row("megatron-energon", "pip install megatron-energon"),
    ]
    found = [(goal.found, goal.met) for goal in judge(rows)]
    assert found == [
        (pytest.approx(0.9), False),
        (pytest.approx(1.8), True),
        (pytest.approx(150.0), True),
    ]
    without_resume = [Row(row.name, row.install, row.speed) for row in rows]
    assert (judge(without_resume)[2].found, judge(without_resume)[2].met) == (None, False)


def test_the_command_prints_every_side_installed_or_not():
    words = ["--batch", "2", "--workers", "1", "--rounds", "1", "--resume-samples", "80"]
    done = CliRunner().invoke(app, ["loader", *words, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["rows"]] == NAMES
    assert result["resumed_at"] == 72
    for row in result["rows"]:
        assert row["install"]
        if row["name"] in (FlowmillPillow.name, WebDataset.name):
            assert row["speed"] > 0
            assert row["resume_seconds"] > 0
            assert row["difference"] <= TOLERANCE
    assert [goal["wanted"] for goal in result["goals"]] == [1.0, 1.5, 100.0]
