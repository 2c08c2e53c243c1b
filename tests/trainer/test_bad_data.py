"""Bad samples and shards in a whole training: counted over all ranks, reported once, within a budget,
and the same when it goes on."""

from contextlib import suppress

import pytest

from data_pipeline.faults import read_lines, read_past
from flows.errors import UserError
from parallel.processes import Ranks
from tests.data_pipeline.test_faults import SPOILED, spoiled
from tests.distributed.harness import run_ranks
from tests.trainer import runs
from trainer.assembly import plan
from trainer.running import _agree

LENGTH = ("train.steps=6", "checkpoint.every=3", "data.max_bad_fraction=0.34")


def report(folder):
    return sorted(
        read_lines(folder / "quarantine.jsonl"), key=lambda line: line.get("position", -1)
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return spoiled(tmp_path_factory.mktemp("data") / "set")


@pytest.mark.slow
def test_metrics_and_report_are_those_of_one_rank_on_two(data, tmp_path):
    changes = (f"data.train={data}", *LENGTH)
    assert runs.train_here(runs.recipe(tmp_path / "one", *changes)).finished
    runs.train(tmp_path / "two", *changes, ranks=2)
    one, two = (runs.series(tmp_path / name, "bad_samples") for name in ("one", "two"))
    assert one.tolist() == two.tolist()
    lines = report(tmp_path / "one")
    assert lines == report(tmp_path / "two")
    # Three epochs of 30 and six positions of the fourth.
    assert 3 * len(SPOILED) <= len(lines) == one[-1]
    assert {int(line["key"]) for line in lines} == set(SPOILED)
    # Losses are sums in another order: to rounding.
    losses = [runs.series(tmp_path / name, "loss") for name in ("one", "two")]
    assert runs.relative(*losses) < 1e-4


def test_a_run_goes_on_with_the_shards_it_began_with(tmp_path):
    pattern = spoiled(tmp_path / "set")
    shards = sorted((tmp_path / "set").iterdir())
    broken = shards[0].read_bytes()
    shards[0].write_bytes(broken[:3000])
    changes = (f"data.train={pattern}", *LENGTH)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 6), (parts, 3)):
        runs.train_here(
            runs.recipe(folder, *changes, f"train.steps={steps}", "optimizer.schedule=constant")
        )
    begun = read_past(parts / "shards.jsonl")
    assert [shard.left_out is None for shard in begun] == [False, True, True]
    shards[0].write_bytes(broken)
    heard = runs.Silence()
    runs.train_here(runs.recipe(parts, *changes, "optimizer.schedule=constant"), heard)
    assert any("1 shards are left out" in note for note in heard.heard)
    assert read_past(parts / "shards.jsonl") == begun
    assert runs.series(parts, "bad_samples").tolist() == runs.series(whole, "bad_samples").tolist()
    assert report(parts) == report(whole)
    assert not runs.different(runs.tensors(parts), runs.tensors(whole))
    assert report(parts)[0]["url"] == str(shards[0])
    # Nothing is tolerated any more: the shard that was left out is named.
    with pytest.raises(UserError, match=r"was left out when this run began"):
        runs.train_here(runs.recipe(parts, *changes, "data.max_bad_fraction=0", "train.steps=9"))


def test_beyond_the_budget_training_stops_with_a_sentence(data, tmp_path):
    changes = (f"data.train={data}", *LENGTH, "data.max_bad_fraction=0.1")
    with pytest.raises(UserError, match=r"^4 bad samples in this epoch of 30, .* allows 3; see "):
        runs.train_here(runs.recipe(tmp_path / "run", *changes))
    assert len(report(tmp_path / "run")) == len(SPOILED)


@pytest.mark.parametrize(
    "mlflow", [pytest.param("true", marks=pytest.mark.slow, id="tracked"), "false"]
)
def test_no_secret_is_written_anywhere(data, tmp_path, monkeypatch, mlflow):
    monkeypatch.setenv("STORAGE_SECRET", "hunter2hunter2")
    changes = (f"data.train={data}", *LENGTH, f"tracking.mlflow={mlflow}", "train.steps=2")
    options = "data.storage.options={s3: {secret: env:STORAGE_SECRET, key: env:STORAGE_SECRET}}"
    folder = tmp_path / "run"
    runs.train_here(runs.recipe(folder, *changes, options))
    assert "env:STORAGE_SECRET" in (folder / "recipe.yaml").read_text()
    assert (tmp_path / "mlflow.db").exists() == (mlflow == "true")
    for path in tmp_path.rglob("*"):
        # The database's journal comes and goes.
        with suppress(FileNotFoundError, IsADirectoryError):
            assert b"hunter2" not in path.read_bytes(), path


def see_shards(ranks: Ranks, patterns: list[str], folder: str) -> str:
    """What a rank says that sees the shards of its own pattern."""
    recipe = runs.recipe(folder, f"data.train={patterns[ranks.rank]}", *LENGTH, "train.batch=2")
    try:
        _agree(plan(recipe, ranks.world_size), ranks)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ranks_that_see_other_shards_stop_together(data, tmp_path):
    one = data.replace("*", "[01]")
    both = run_ranks(see_shards, 2, patterns=[data, one], folder=str(tmp_path / "run"))
    assert all("rank 1 sees other shards in data.train" in said for said in both)
    assert run_ranks(see_shards, 2, patterns=[one, one], folder=str(tmp_path / "run")) == ["", ""]
