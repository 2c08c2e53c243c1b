"""The same recipe goes on; another science is refused; the layout and the length may change."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import data_pipeline
from tests.launch.conftest import SHORT, Flowmill, Refused
from trainer.recipe import build_recipe, override_recipe
from trainer.run_folder import FIXED, RunFolder, check_resume, open_run

# One changed value for each key that decides the science of a run.
SCIENCE = {
    "seed": "1",
    "data.image_size": "16",
    "data.channels": "3",
    "data.classes": "11",
    "data.keep.cls": "[1, 2]",
    "data.augment.flip": "0.5",
    "data.lanes": "8",
    "data.window": "8",
    "model.name": "SiT-nano/2",
    "model.patch": "4",
    "model.width": "16",
    "model.depth": "2",
    "model.heads": "2",
    "model.learn_sigma": "true",
    "objective.path": "gvp",
    "objective.prediction": "data",
    "objective.weighting": "velocity",
    "objective.label_drop": "0.2",
    "objective.time.kind": "logit_normal",
    "train.batch": "16",
    "train.ema": "[0.9]",
}
FREE = (
    "train.steps=6", "train.microbatch=4", "train.log_every=2", "train.precision=bf16",
    "train.checkpoint_activations=1", "parallel.strategy=ddp", "parallel.reshard_after_forward=false",
    "parallel.timeout_seconds=60", "checkpoint.every=3", "checkpoint.keep=1", "optimizer.lr=1e-4",
    "sample.every=6", "sample.count=10", "data.threads=2", "data.prefetch=1", "tracking.experiment=x",
)  # fmt: skip


# Shards of images are no latents: that is refused before the run is looked at.
REFUSED_EARLIER = {"data.latents"}


def test_every_fixed_key_is_tried() -> None:
    tried = (*SCIENCE, *REFUSED_EARLIER)
    assert all(any(f"{key}.".startswith(f"{fixed}.") for key in tried) for fixed in FIXED)


@pytest.mark.parametrize(("key", "value"), SCIENCE.items())
def test_another_science_is_refused(refused: Refused, key: str, value: str) -> None:
    changes = [f"{key}={value}"]
    if key == "data.classes":
        changes.append("data.class_names=null")
    said = refused("train", "digits8", "run.dir=runs/kept", *SHORT, *changes, says=(f"{key} was",))
    assert said.count(" was ") == 1


def test_the_checkpoint_guards_the_science_too(refused: Refused) -> None:
    """Whoever edits or loses the recipe of the folder goes on with no other run."""
    Path("runs/kept/recipe.yaml").unlink()
    train = ("train", "digits8", "run.dir=runs/kept", *SHORT)
    refused(*train, "seed=1", says=("run.dir = runs/kept", "seed was 0 and is now 1"))
    refused(*train, "train.steps=3", says=("step 4, beyond train.steps = 3", "raise train.steps"))


def test_the_shards_may_move_but_not_become_others(
    flowmill: Flowmill, refused: Refused, place: Path
) -> None:
    embedded = Path(str(data_pipeline.__file__)).parent / "embedded" / "digits8"
    for shard in embedded.glob("train-*.tar"):
        shutil.copy(shard, place)
    train = ("train", "digits8", "run.dir=runs/kept", *SHORT, "train.steps=5")
    heldout = "data.train=embedded:digits8/heldout-000000.tar"
    refused(*train, heldout, says=("another stream of samples", "restore data.train"))
    ended = flowmill(*train, f"data.train={place}/train-*.tar")
    assert ended.code == 0, ended.err
    assert "changed since it began: data.train: " in ended.err


def test_what_a_run_begun_anew_finds_of_later_steps_goes(flowmill: Flowmill, place: Path) -> None:
    for step in (3, 4, 9):
        Path(f"runs/kept/samples/step-{step:08d}.npz").write_bytes(b"torn")
    shutil.rmtree("runs/kept/checkpoints/step-00000004")
    changes = ("sample.every=4", "sample.count=2")
    ended = flowmill("train", "digits8", "run.dir=runs/kept", *SHORT, *changes)
    assert ended.code == 0, ended.err
    names = sorted(path.name for path in Path("runs/kept/samples").glob("*.npz"))
    # That of step 3 is from after the checkpoint too; those of step 4 were drawn again.
    assert names == ["step-00000004.npz"]
    Path("runs/kept/samples/step-00000002.npz").write_bytes(b"torn")
    ended = flowmill("train", "digits8", "run.dir=runs/kept", *SHORT, *changes, "train.steps=6")
    assert (ended.code, "step-00000002.npz is damaged" in ended.err) == (0, True), ended.err


def test_before_the_first_checkpoint_everything_may_change(place: Path) -> None:
    run, recipe = open_run("runs/kept")
    shutil.rmtree(run.checkpoints)
    assert check_resume(run, override_recipe(recipe, ["seed=1"])) == ["seed: 0 -> 1"]


def test_layout_and_length_may_change(flowmill: Flowmill, place: Path) -> None:
    ended = flowmill("train", "digits8", "run.dir=runs/kept", *SHORT, *FREE)
    assert ended.code == 0, ended.err
    assert "resuming runs/kept from step 4" in ended.err
    for change in FREE:
        assert f"changed since it began: {change.partition('=')[0]}: " in ended.err
    written = yaml.safe_load(Path("runs/kept/recipe.yaml").read_text())
    assert (written["train"]["steps"], written["optimizer"]["lr"]) == (6, 1e-4)
    lines = Path("runs/kept/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_not_kept_in_the_place_of_a_whole_one(
    flowmill: Flowmill, place: Path
) -> None:
    (shard,) = Path("runs/kept/checkpoints/step-00000004").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ended = flowmill(
        "train", "digits8", "run.dir=runs/kept", *SHORT, "train.steps=5", "checkpoint.every=5"
    )
    assert (ended.code, "resuming runs/kept from step 2" in ended.err) == (0, True), ended.err
    said = flowmill("checkpoint", "verify", "runs/kept", "--json").out
    assert [one["step"] for one in json.loads(said) if one["damage"] is None] == [2, 5]


def test_a_run_that_is_done_stays_as_it_is(flowmill: Flowmill, place: Path) -> None:
    before = Path("runs/kept/metrics.jsonl").read_bytes()
    ended = flowmill("train", "digits8", "run.dir=runs/kept", *SHORT)
    assert ended.code == 0
    assert "done after step 4 of 4" in ended.err
    assert Path("runs/kept/metrics.jsonl").read_bytes() == before


def test_the_folder_may_move(flowmill: Flowmill, place: Path) -> None:
    Path("runs/kept").rename("moved")
    ended = flowmill("train", "digits8", "run.dir=moved", *SHORT, "train.steps=5")
    assert ended.code == 0
    assert "resuming moved from step 4" in ended.err
    assert "changed since it began: run.dir" not in ended.err


def test_the_written_recipe_is_the_whole_recipe(place: Path) -> None:
    data = yaml.safe_load(Path("runs/kept/recipe.yaml").read_text())
    recipe = build_recipe(data, "the written recipe")
    assert recipe == open_run("runs/kept")[1]
    assert recipe.model_dump(mode="json") == data
    assert check_resume(RunFolder(Path("runs/kept")), recipe) == []
