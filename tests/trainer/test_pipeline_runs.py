"""A recipe with a pipeline: the run is that of one rank, and either goes on from the other's checkpoint."""

from pathlib import Path

import pytest

from flows.errors import UserError
from tests.trainer import families, runs
from trainer.assembly import plan

SIZE = (
    "model.depth=6", "train.microbatch=4", "train.steps=6", "checkpoint.every=6",
    "optimizer.schedule=constant",
)  # fmt: skip
# A step in another layout, to rounding; Adam's small divisors make more of it with every step.
EXACT = 1e-5


def test_a_pipelined_run_is_that_of_one_rank_and_goes_on_as_it(tmp_path: Path) -> None:
    bitpipe = ("parallel.pp=2", "parallel.schedule=bitpipe", "sample.every=6", "sample.steps=2")
    one = tmp_path / "one"
    runs.train_here(runs.recipe(one, *SIZE, "train.steps=9"))
    two = runs.train(tmp_path / "two", *SIZE, *bitpipe, ranks=2)
    assert (two / "samples" / "step-00000006.png").is_file()
    leaving = ("parallel.pp=1", "parallel.schedule=bitpipe")
    runs.train_here(runs.recipe(two, *SIZE, *leaving, "train.steps=9"))
    for key in ("loss", "grad_norm"):
        assert runs.relative(runs.series(two, key), runs.series(one, key)) <= EXACT
    ours, theirs = runs.tensors(two), runs.tensors(one)
    for part in ("model.", "ema.0.5.", "optimizer."):
        assert runs.distance(ours, theirs, part) <= EXACT


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_in_stages_that_fsdp_cuts(tmp_path: Path) -> None:
    one = tmp_path / "one"
    runs.train_here(runs.recipe(one, *SIZE, "train.steps=9"))
    moved = tmp_path / "moved"
    runs.train_here(runs.recipe(moved, *SIZE))
    zbv = ("parallel.pp=2", "parallel.schedule=zbv", "train.steps=9")
    runs.train(moved, *SIZE, *zbv, ranks=4)
    assert runs.relative(runs.series(moved, "loss"), runs.series(one, "loss")) <= EXACT
    assert runs.distance(runs.tensors(moved), runs.tensors(one), "") <= EXACT


@pytest.mark.parametrize(
    ("changes", "ranks", "sentence"),
    [
        (
            ["parallel.pp=2"],
            3,
            "parallel.pp = 2 does not divide 3 ranks; it may be 1 or 3, or start 2 ranks",
        ),
        (
            ["parallel.pp=2", "parallel.ep=2"],
            4,
            "parallel.ep = 2 divides experts, and model.family = dit has none",
        ),
        (["parallel.pp=2", "train.compile=true"], 2, "train.compile = true does not go together"),
        (["parallel.pp=2", "train.microbatch=5"], 2, "train.microbatch = 5 does not divide the 16"),
        (["parallel.pp=2", "parallel.schedule=bitpipe"], 2, "= 1 is odd, and bitpipe runs in two"),
        (["parallel.pp=8", "train.microbatch=1"], 8, "4 places to cut at, too few for 8 stages"),
        (  # no order is looked for, which would take minutes
            [
                "parallel.pp=200",
                "parallel.schedule=bitpipe",
                "train.batch=400",
                "train.microbatch=1",
            ],
            200,
            "4 places to cut at, too few for 400 stages",
        ),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(
    tmp_path: Path, changes: list[str], ranks: int, sentence: str
) -> None:
    with pytest.raises(UserError) as refused:
        plan(runs.recipe(tmp_path, *changes), ranks)
    assert sentence in str(refused.value)


def test_a_schedule_without_a_pipeline_is_not_used(tmp_path: Path) -> None:
    recipe = runs.recipe(tmp_path, "parallel.schedule=zbv", "parallel.chunks=3")
    assert plan(recipe, 1).degrees == plan(runs.recipe(tmp_path), 1).degrees


def test_a_family_that_is_not_cut_is_refused(tmp_path: Path) -> None:
    recipe = families.recipe("jet", tmp_path, {"pp": 2})
    with pytest.raises(UserError, match=r"model\.family = jet is not cut into stages"):
        plan(recipe, 2)
