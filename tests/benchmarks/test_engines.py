"""The benchmark of engines compares the same work, or refuses to compare."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.engines import AGAINST, BARE, GOAL, Engines, Row, measure
from benchmarks.overhead import LARGEST_DIFFERENCE
from flows.errors import UserError
from trainer.recipe import load_recipe

TINY = ["model.width=32", "model.depth=2", "train.batch=16", "tracking.mlflow=false"]


@pytest.mark.parametrize(
    "other", ["train.precision=bf16", "train.microbatch=4", "train.compile=true"]
)
def test_other_work_is_refused(other: str) -> None:
    with pytest.raises(UserError, match=other.partition("=")[0]):
        measure(load_recipe("digits8", [*TINY, other]), rounds=12, warm_up=2)


def test_a_goal_is_met_by_speed_alone() -> None:
    rows = [
        Row("flowmill ddp", BARE[0], 1.0, GOAL, 0.0),
        Row("flowmill fsdp", BARE[1], 1.0, GOAL - 0.01, 0.0),
        Row("DeepSpeed zero-1", BARE[0], None, None, None),
    ]
    assert Engines(1, 2, 8, 1, rows).goals == [
        ("flowmill ddp", GOAL, True),
        ("flowmill fsdp", GOAL - 0.01, False),
    ]


@pytest.mark.slow
def test_all_sides_do_the_same_work() -> None:
    command = [sys.executable, "-m", "launch", "bench", "engines", "digits8", *TINY]
    found = subprocess.run(
        [*command, "--rounds", "10", "--json"],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert [row["name"] for row in result["rows"]] == [*BARE, *AGAINST]
    assert result["ranks"] == 2
    for row in result["rows"]:
        assert row["difference"] <= LARGEST_DIFFERENCE
        assert row["seconds"] > 0
    assert [goal["side"] for goal in result["goals"]] == ["flowmill ddp", "flowmill fsdp"]
