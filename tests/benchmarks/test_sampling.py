"""The sampling benchmark compares ways that carry the same noise through the same flow."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.sampling import train_and_measure
from flows.errors import UserError
from trainer.recipe import load_recipe

HOW = {"rounds": 2, "patience": 60.0, "group": 4, "tolerance": 1e-3}
TINY = ["train.steps=6", "train.batch=8", "model.width=32", "optimizer.lr=0.01"]


@pytest.fixture(scope="module")
def cost():
    notes = []
    recipe = load_recipe("tarflow_digits", TINY)
    found = train_and_measure(recipe, notes.append, batches=[1, 3], samples=20, **HOW)
    assert "training tarflow_digits for 6 steps" in notes
    assert any(note.startswith("training: step 3 of 6, loss ") for note in notes)
    assert any(note.startswith("batches of 3: sequential ") for note in notes)
    return found


def test_every_way_is_timed_and_judged(cost) -> None:
    names = ["sequential", "Jacobi", "GS-Jacobi", "sliding GS-Jacobi", "automatic"]
    assert [way.name for way in cost.ways] == names
    assert all(set(way.seconds) == {1, 3} for way in cost.ways)
    assert all(seconds > 0 for way in cost.ways for seconds in way.seconds.values())
    assert all(way.turns == {1: 2, 3: 2} for way in cost.ways)
    assert cost.speedup("sequential", 3) == 1.0
    first, every = cost.goals
    assert first.found == cost.speedup("automatic", 1)
    assert every.found == min(cost.speedup("automatic", size) for size in (1, 3))
    assert (first.met, every.met) == (first.found >= 3, every.found >= 0.95)
    assert set(cost.choices) == {1, 3}
    assert all(len(choices) == 4 for choices in cost.choices.values())


def test_ways_cost_different_calls_and_give_the_same_samples(cost) -> None:
    by_name = {way.name: way for way in cost.ways}
    sequential = by_name.pop("sequential")
    assert sequential.network_calls == 2 * 15  # guided
    assert sequential.difference == 0.0
    assert sequential.distance > 0
    for way in by_name.values():
        assert way.network_calls <= sequential.network_calls
        assert way.difference < 1e-2
        assert way.distance == pytest.approx(sequential.distance, rel=1e-2)
    assert by_name["Jacobi"].network_calls < sequential.network_calls


def test_models_that_are_not_inverted_token_by_token_are_refused() -> None:
    recipe = load_recipe("jet_digits", ["train.steps=1", "train.batch=4", "model.width=32"])
    with pytest.raises(UserError, match="family jet, which is not inverted token by token"):
        train_and_measure(recipe, print, batches=[1], samples=2, **HOW)


def test_the_command_prints_json_and_a_table_of_a_given_run(tmp_path) -> None:
    from benchmarks.sampling import _Told
    from trainer.running import run_training

    changes = [f"run.dir={tmp_path}/run", "tracking.mlflow=false", "sample.every=0"]
    run_training(load_recipe("tarflow_digits", TINY + changes), 1, _Told(print, 6))
    quick = [
        "--run",
        f"{tmp_path}/run",
        "--batch",
        "2",
        "--rounds",
        "4",
        "--samples",
        "4",
        "--patience",
        "0",
    ]
    printed = CliRunner().invoke(app, ["sampling", *quick, "--json"])
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert found["ways"][0]["seconds"]["2"] > 0
    assert found["ways"][0]["turns"]["2"] == 1  # beyond its patience at once
    assert [goal["met"] for goal in found["goals"]] == [
        goal["found"] >= goal["wanted"] for goal in found["goals"]
    ]
    table = CliRunner().invoke(app, ["sampling", *quick])
    assert "automatic" in table.stdout
    assert "batch 2" in table.stdout
    # A table is there whether its goals are met or missed.
    assert table.exit_code == 0
    assert "wanted" in table.stdout
