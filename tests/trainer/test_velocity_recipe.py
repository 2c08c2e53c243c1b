"""Every option of a velocity model's objective can be asked for in a recipe, or is refused there."""

from pathlib import Path

import pytest

from flows.bases import Inpainting, SuperResolution
from flows.couplings import Coupling
from flows.errors import UserError
from flows.objectives.boundary import Boundary
from flows.paths import linear, polynomial
from tests.trainer import runs
from trainer.assembly import build_flow_matching, plan
from trainer.recipe import load_recipe

FOLDER = Path("runs/never")

ASKED = [
    ("path=polynomial", "path", polynomial(2.0)),
    ("sigma_min=1.0e-5", "path", linear(1e-5)),
    ("prediction=score", "prediction", "score"),
    ("weighting=likelihood", "weighting", "likelihood"),
    ("loss=pseudo_huber", "shape", "pseudo_huber"),
    ("coupling.kind=assignment", "coupling", Coupling("assignment", 0.0, 0)),
    ("coupling={kind: stable, group: 8}", "coupling", Coupling("stable", 0.0, 8)),
    ("coupling={kind: weighted, epsilon: 50}", "coupling", Coupling("weighted", 50.0, 0)),
    ("bridge=0.5", "bridge", 0.5),
    ("contrast=0.05", "contrast", 0.05),
    ("base.kind=inpainting", "base", Inpainting(4, 0.5)),
    ("base.kind=super_resolution", "base", SuperResolution(2, 0.1)),
    ("boundary.ends=data", "boundary", Boundary(2.0, None)),
    ("boundary={ends: both, mean: [0.1]}", "boundary", Boundary(2.0, (0.1,))),
    ("alignment=0.5", "alignment", 0.5),
]


@pytest.mark.parametrize(("change", "option", "value"), ASKED, ids=[a for a, _, _ in ASKED])
def test_an_option_of_the_recipe_is_one_of_the_objective(change, option, value):
    plain = build_flow_matching(runs.recipe(FOLDER))
    asked = build_flow_matching(runs.recipe(FOLDER, f"objective.{change}"))
    assert getattr(asked, option) == value != getattr(plain, option)


def test_times_of_the_recipe():
    u_shaped = runs.recipe(FOLDER, "objective.time={kind: u_shaped, stratified: true}")
    time = build_flow_matching(u_shaped).time
    assert (time.kind, time.steepness, time.strata) == ("u_shaped", 4.0, u_shaped.train.batch)
    assert build_flow_matching(runs.recipe(FOLDER)).time.strata == 0


def test_the_plan_of_a_bridge_fits_it():
    """Regularised by 2 sigma^2, as the Schroedinger bridge asks."""
    recipe = runs.recipe(FOLDER, "objective={bridge: 0.5, coupling: {kind: entropic}}")
    assert build_flow_matching(recipe).coupling == Coupling("entropic", 0.5, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["objective.coupling.kind=weighted"], "set objective.coupling.epsilon"),
        (["objective.boundary.ends=both"], "set objective.boundary.mean"),
        (
            ["objective.boundary={ends: both, mean: [0, 0]}"],
            "lists 2 numbers for data.channels = 1",
        ),
        (["objective.base={kind: super_resolution, factor: 3}"], "does not divide data.image_size"),
        (["objective.base.kind=inpainting", "sample.every=5"], "set sample.every=0"),
        (["objective.coupling.kind=stable", "sample.solver=sde"], "use another solver"),
        (["objective.bridge=0.3", "objective.path=gvp"], "objective.bridge is for velocities"),
        (["objective={contrast: 0.1, loss: pseudo_huber}"], "set objective.loss=squared"),
        (["objective.time={kind: u_shaped, steepness: 2000}"], "steepness = 2000"),
        (["objective.contrast=1"], "objective.contrast = 1 must be below 1"),
        (["objective.alignment=0.5"], "which no shards hold; set objective.alignment=0"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_rank(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        plan(runs.recipe(tmp_path / "run", *changes), 1)


def test_a_run_with_coupled_samples_and_negatives(tmp_path):
    options = "objective={coupling: {kind: assignment}, contrast: 0.05, time: {stratified: true}}"
    outcome = runs.train_here(runs.recipe(tmp_path / "run", "train.steps=3", options))
    assert outcome.finished
    seconds = runs.lines(tmp_path / "run")[-1]["seconds"]
    assert seconds["couple"] > 0


def test_a_solver_that_takes_its_own_steps_is_not_said_to_take_others():
    recipe = load_recipe("digits8", ["sample.solver=dopri5", "sample.steps=2"])
    assert recipe.sample.in_words() == f"dopri5, guidance {recipe.sample.guidance:g}"
    assert "sample.guidance" in recipe.sample.remedy
    assert "model.clip" in load_recipe("tarflow_bits", []).sample.remedy
