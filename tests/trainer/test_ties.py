"""A choice that rounding turns is called that, and nothing else is."""

from pathlib import Path

import pytest
import torch

from flows.models import choice
from flows.models.choice import Routing
from tests.trainer import families, runs, ties
from tests.trainer.test_expert_law import EXACT, hold
from trainer import running
from trainer.recipe import override_recipe

GATE = "blocks.0.mixture.router.gate.weight"
TWINS = 1, 4  # experts
ROUNDING = 2.0**-22


def train(folder: Path, *changes: str) -> Path:
    recipe = families.recipe("dit_moe", folder)
    runs.train_here(override_recipe(recipe, ["train.steps=6", "sample.every=0", *changes]))
    return folder


def plant(patch: pytest.MonkeyPatch, apart: float) -> None:
    """From now on two experts of the first layer are scored the same, but for the share `apart`."""
    build = running.build_engine

    def planted(*arguments):
        engine = build(*arguments)
        gate = engine.parameters()[GATE]
        with torch.no_grad():
            gate[TWINS[1]] = gate[TWINS[0]] * (1.0 + apart)
        return engine

    patch.setattr(running, "build_engine", planted)


def test_a_tie_that_rounding_turns_is_named(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, ROUNDING)
        ours = train(tmp_path / "ours")
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, 0.0)
        theirs = train(tmp_path / "theirs")
        with pytest.raises(
            ties.RoutingTie,
            match=r"part in step \d, where in layer 0 token \d of sample \d .* experts \[1, 4\]",
        ):
            hold(ours, theirs, cut=False)


def test_a_place_that_rounding_gives_away_is_found():
    """Two tokens of a sample want the one place of an expert with the same score; a third wants another's."""
    scores = torch.tensor(
        [[[0.6, 0.1, 0.2, 0.1], [0.6 + 1e-7, 0.2, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]]]
    )
    with ties.recorded() as choices:
        _, routed, _ = choice.tokens_choose(scores, None, Routing(4, 1, capacity=1.0), None)
    assert float(routed.dropped) == 1.0
    (places,) = choices.places
    assert [tie[:3] for tie in places.ties()] == [(0, 0, [0, 1])]
    (experts,) = choices.experts
    assert list(experts.ties()) == []


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("ties") / "theirs")


@pytest.mark.parametrize("change", ["optimizer.lr=0.002", "model.balance_weight=0.02"])
def test_what_is_wrong_without_a_tie_is_no_tie(theirs, tmp_path, change):
    ours = train(tmp_path / "ours", change)
    assert ties.parting(ours, theirs, EXACT) is not None
    ties.check(ours, theirs, EXACT)
    with pytest.raises(AssertionError) as failed:
        hold(ours, theirs, cut=False)
    assert not isinstance(failed.value, ties.RoutingTie)


def test_runs_that_do_not_part_are_not_trained_again(theirs, tmp_path, monkeypatch):
    ours = train(tmp_path / "ours", "train.microbatch=2")
    monkeypatch.setattr(ties, "decisions", None)
    ties.check(ours, theirs, EXACT)
