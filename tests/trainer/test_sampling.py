"""Samples of a trained model: the same from the training and from its checkpoint, in any batch."""

import numpy as np
import pytest
import torch

from flows.errors import UserError
from flows.randomness import Draw
from tests.trainer import runs
from trainer.asked import ask
from trainer.assembly import model_architecture
from trainer.recipe import Recipe
from trainer.run_folder import RunFolder, open_run
from trainer.sampling import with_overrides
from trainer.trained import sample_checkpoint

DRAWN = ("sample.steps=4", "sample.count=6", "sample.guidance=2.0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[RunFolder, Recipe]:
    folder = tmp_path_factory.mktemp("sampling") / "run"
    changes = ("train.steps=12", "checkpoint.every=6", "sample.every=12", *DRAWN)
    runs.train_here(runs.recipe(folder, *changes))
    return open_run(str(folder))


def test_the_training_shows_what_its_checkpoint_gives(trained):
    run, recipe = trained
    with np.load(run.samples / "step-00000012.npz") as file:
        shown, labels = file["images"].astype(float), file["labels"].tolist()
    drawn = sample_checkpoint(run, recipe, 6)
    pixels = drawn.images.clamp(-1, 1).add(1).mul(127.5).numpy()
    assert np.abs(shown - pixels).max() <= 0.51, "but for rounding to whole numbers"
    assert labels == drawn.labels.tolist()
    assert drawn.images.std() > 0.1


def test_a_sample_does_not_depend_on_how_many_are_drawn(trained):
    """Also where there are more than one network call takes."""
    run, recipe = trained
    few, many = (sample_checkpoint(run, recipe, count) for count in (5, 131))
    torch.testing.assert_close(many.images[:5], few.images, rtol=1e-5, atol=1e-5)
    assert many.images.shape == (131, 1, 8, 8)
    apart = torch.cdist(many.images.flatten(1), many.images.flatten(1)).fill_diagonal_(9)
    assert apart.min() > 1e-3, "no two are the same"


def test_samples_come_from_the_first_average(trained):
    run, recipe = trained
    drawn = sample_checkpoint(run, recipe, 4).images
    for source, same in (("ema.0.5.", True), ("ema.0.99.", False), ("model.", False)):
        by_hand = guided_euler(runs.tensors(run.root), source, recipe)
        assert torch.allclose(by_hand, drawn, atol=1e-6) == same, source


def guided_euler(weights: dict[str, torch.Tensor], source: str, recipe: Recipe) -> torch.Tensor:
    """Four samples of the weights that are stored under `source`, drawn by hand."""
    model = model_architecture(recipe).build()
    state = {n.removeprefix(source): w for n, w in weights.items() if n.startswith(source)}
    model.load_state_dict(state)
    label, none = torch.arange(4), torch.full((4,), recipe.data.classes)
    x = Draw(recipe.seed, 0, torch.arange(4)).normal("sample_noise", (1, 8, 8))
    with torch.no_grad():
        for step in range(4):
            t = torch.full((4,), step / 4)
            plain, asked = model(x, t, none), model(x, t, label)
            x = x + (plain + 2.0 * (asked - plain)) / 4
    return x


def test_calls_of_the_network_are_counted(trained):
    run, recipe = trained
    for solver, guidance, calls in (("euler", 1.0, 4), ("euler", 2.0, 8), ("heun", 2.0, 16)):
        changed = with_overrides(recipe, [f"sample.solver={solver}", f"sample.guidance={guidance}"])
        assert sample_checkpoint(run, changed, 2).network_calls.tolist() == [calls] * 2


def test_classes_come_in_turn(trained):
    _, recipe = trained
    assert ask(recipe, torch.arange(8, 13)).labels.tolist() == [8, 9, 0, 1, 2]


def test_another_seed_is_other_samples_and_the_training_is_not_touched(trained):
    run, recipe = trained
    first = sample_checkpoint(run, recipe, 2).images
    other = sample_checkpoint(run, with_overrides(recipe, ["seed=5"]), 2).images
    assert (first - other).abs().max() > 0.1
    with pytest.raises(UserError, match=r"'train\.steps=3' would change the training"):
        with_overrides(recipe, ["train.steps=3"])


def test_without_averages_the_weights_themselves_are_drawn_from(tmp_path):
    runs.train_here(runs.recipe(tmp_path / "run", "train.steps=9", "train.ema=[]", *DRAWN))
    run, recipe = open_run(str(tmp_path / "run"))
    by_hand = guided_euler(runs.tensors(run.root), "model.", recipe)
    torch.testing.assert_close(sample_checkpoint(run, recipe, 4).images, by_hand)


def test_nothing_trained_is_nothing_to_sample(tmp_path):
    run, recipe = RunFolder(tmp_path / "run"), runs.recipe(tmp_path / "run")
    with pytest.raises(UserError, match="no whole checkpoint yet"):
        sample_checkpoint(run, recipe, 1)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(trained, tmp_path, caplog):
    run, recipe = trained
    before = sample_checkpoint(run, recipe, 2).images
    newest = run.checkpoints / "step-00000012"
    (shard,) = newest.glob("shard-*")
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        older = sample_checkpoint(run, recipe, 2).images
    finally:
        shard.write_bytes(whole)
    assert shard.name in caplog.text
    assert (older - before).abs().max() > 1e-4


def test_ranks_that_take_steps_of_their_own_draw_from_a_sharded_model(tmp_path):
    """dopri5 calls the network as often as its samples ask for: the ranks hold it whole meanwhile."""
    changes = ("train.steps=6", "sample.every=4", "sample.solver=dopri5", "sample.count=5")
    shown = []
    for ranks in (1, 2):
        folder = runs.train(tmp_path / str(ranks), *changes, ranks=ranks)
        for step in (4, 6):
            with np.load(folder / "samples" / f"step-{step:08d}.npz") as file:
                shown.append(file["images"].astype(float))
    for alone, together in ((shown[0], shown[2]), (shown[1], shown[3])):
        # Steps suit the samples at hand, so that the ends agree to the solver's tolerance alone.
        assert np.abs(alone - together).max() <= 1.0
    assert runs.relative(runs.series(folder, "loss"), runs.series(tmp_path / "1", "loss")) < 1e-5
