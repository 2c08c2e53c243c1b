"""The benchmark compares the same work, or refuses to compare."""

import pytest

from benchmarks.overhead import LARGEST_DIFFERENCE, measure
from flows.errors import UserError
from trainer.recipe import load_recipe

TINY = ["model.width=32", "model.depth=2", "train.batch=16", "tracking.mlflow=false"]


def test_both_sides_do_the_same_work() -> None:
    found = measure(load_recipe("digits8", TINY), pairs=12, warm_up=2)
    assert found.weight_difference <= LARGEST_DIFFERENCE
    assert found.trainer_seconds > 0
    assert found.loop_seconds > 0


@pytest.mark.parametrize(
    "other", ["train.precision=bf16", "train.microbatch=8", "train.ema=[0.9,0.99]", "train.ema=[]"]
)
def test_other_work_is_refused(other: str) -> None:
    with pytest.raises(UserError, match=other.partition("=")[0]):
        measure(load_recipe("digits8", [*TINY, "sample.every=0", other]), pairs=12, warm_up=2)
