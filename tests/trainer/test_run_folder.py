"""The folder of a run: one writer, a recipe that is whole, and no resume into another run."""

import json
import os
from pathlib import Path

import pytest

from flows.errors import UserError
from tests.trainer import runs
from trainer.recipe import write_recipe
from trainer.run_folder import (
    RunFolder,
    check_length,
    check_place,
    check_resume,
    check_science,
    lock_if_free,
    locked,
    open_run,
    science,
)

# Every key that decides the science of a run, changed.
OTHER_SCIENCE = {
    "seed": "seed=1",
    "data.image_size": "data.image_size=16",
    "data.channels": "data.channels=3",
    "data.classes": "data.classes=11",
    "data.augment.crop": "data.augment.crop=random",
    "data.augment.scale": "data.augment.scale=[0.1, 1]",
    "data.augment.aspect": "data.augment.aspect=[1, 2]",
    "data.augment.flip": "data.augment.flip=0.5",
    "data.lanes": "data.lanes=8",
    "data.window": "data.window=8",
    "model.width": "model.width=64",
    "model.name": "model.name=SiT-S/2",
    "objective.prediction": "objective.prediction=data",
    "objective.path": "objective.path=gvp",
    "objective.label_drop": "objective.label_drop=0.2",
    "objective.time.shift": "objective.time.shift=0.5",
    "train.batch": "train.batch=32",
    "train.ema": "train.ema=[0.9]",
}
SAME_SCIENCE = {
    "train.steps": "train.steps=7",
    "train.microbatch": "train.microbatch=2",
    "train.precision": "train.precision=bf16",
    "optimizer.lr": "optimizer.lr=0.5",
    "parallel.strategy": "parallel.strategy=ddp",
    "checkpoint.every": "checkpoint.every=3",
    "sample.steps": "sample.steps=3",
    "data.decoder": "data.decoder=auto",
    "data.heldout": "data.heldout=null",
    "data.train": "data.train=elsewhere/train-*.tar",
    "tracking.mlflow": "tracking.mlflow=true",
}


@pytest.fixture
def begun(tmp_path) -> RunFolder:
    """A run folder with a recipe and something that may be a checkpoint."""
    run = RunFolder(tmp_path / "run")
    with locked(run):
        write_recipe(runs.recipe(run.root), run.recipe)
        (run.checkpoints / "step-00000005").mkdir()
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("key", OTHER_SCIENCE)
def test_a_run_is_not_continued_as_another(begun, key):
    before = content(begun.root)
    with pytest.raises(UserError) as refused:
        check_resume(begun, runs.recipe(begun.root, OTHER_SCIENCE[key]))
    sentence = str(refused.value)
    assert f"{key} was " in sentence
    assert str(begun.root) in sentence
    assert "run.dir" in sentence
    assert content(begun.root) == before


@pytest.mark.parametrize("key", OTHER_SCIENCE)
def test_a_checkpoint_knows_its_science_without_the_recipe_beside_it(begun, key):
    saved = json.loads(json.dumps(science(runs.recipe(begun.root))))
    check_science(begun, saved, runs.recipe(begun.root))
    with pytest.raises(UserError, match=rf"{key} was .* is now"):
        check_science(begun, saved, runs.recipe(begun.root, OTHER_SCIENCE[key]))


@pytest.mark.parametrize("key", SAME_SCIENCE)
def test_a_checkpoint_holds_nothing_that_may_change(begun, key):
    made = runs.recipe(begun.root, SAME_SCIENCE[key])
    assert science(made) == science(runs.recipe(begun.root))


def test_a_run_is_not_made_shorter_than_it_is(begun):
    check_length(begun, 30, runs.recipe(begun.root, "train.steps=30"))
    with pytest.raises(UserError, match=r"step 60, beyond train\.steps = 30; raise"):
        check_length(begun, 60, runs.recipe(begun.root, "train.steps=30"))


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runs.recipe(Path("~/run")).run.dir == str(tmp_path / "run")
    assert runs.recipe(Path("./~run")).run.dir == "~run"


@pytest.mark.parametrize("key", SAME_SCIENCE)
def test_what_does_not_decide_the_science_may_change_and_is_told(begun, key):
    (told,) = check_resume(begun, runs.recipe(begun.root, SAME_SCIENCE[key]))
    assert told.startswith(f"{key}: ")
    assert " -> " in told


def test_the_same_recipe_changes_nothing_also_where_the_folder_was_moved(begun, tmp_path):
    assert check_resume(begun, runs.recipe(begun.root)) == []
    begun.root.rename(tmp_path / "moved")
    moved = RunFolder(tmp_path / "moved")
    assert check_resume(moved, runs.recipe(moved.root)) == []


def test_a_folder_without_checkpoints_may_begin_anew(begun):
    (begun.checkpoints / "step-00000005").rmdir()
    (told,) = check_resume(begun, runs.recipe(begun.root, "seed=1"))
    assert told == "seed: 0 -> 1"
    assert check_resume(RunFolder(begun.root / "new"), runs.recipe(begun.root / "new")) == []


def test_only_one_process_writes(begun):
    with locked(begun):
        for attempt in (lambda: locked(begun).__enter__(), lambda: check_place(begun)):
            with pytest.raises(UserError, match=r"Another process is training in .*run"):
                attempt()
        with lock_if_free(begun) as free:
            assert not free
    check_place(begun)
    with lock_if_free(begun) as free, pytest.raises(UserError, match="Another process"):
        locked(begun).__enter__()
    assert free
    with locked(begun):
        pass


def test_the_recipe_is_replaced_at_once(begun):
    """A kill while it is written leaves the old one whole: it is never written over."""
    with begun.recipe.open() as held:
        write_recipe(runs.recipe(begun.root, "train.steps=7"), begun.recipe)
        assert "steps: 1500" in held.read()
    _, made = open_run(str(begun.root))
    assert made.train.steps == 7
    assert made == runs.recipe(begun.root, "train.steps=7")


@pytest.mark.parametrize("text", ["", "just a word", "name: [", "name: x\nseeed: 3\n"])
def test_a_recipe_that_cannot_be_read_is_named(begun, text):
    begun.recipe.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        open_run(str(begun.root))
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        check_resume(begun, runs.recipe(begun.root))


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        open_run(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_a_place_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        run = RunFolder(place)
        with pytest.raises(UserError, match=r"run\.dir"):
            check_place(run)
        with pytest.raises(UserError, match=r"run\.dir"), locked(run):
            pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_place_that_may_not_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match=r"run\.dir"):
            check_place(RunFolder(tmp_path / "run"))
    finally:
        tmp_path.chmod(0o700)
