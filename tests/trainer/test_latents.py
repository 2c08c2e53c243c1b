"""Training on latents is training with the autoencoder in the loop; whatever does not fit is refused."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.encode import encode, open_job
from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.job import Settings
from data_pipeline.latents import scaled, unscaled
from flows.batch import Batch
from flows.errors import UserError
from flows.randomness import Draw
from launch.progress import ProgressLine
from parallel.processes import Ranks
from tests import networks
from trainer.assembly import build_objective, plan
from trainer.judging import judge_run
from trainer.latents import to_images
from trainer.recipe import Recipe, load_recipe
from trainer.run_folder import RunFolder
from trainer.running import open_loader, run_training
from trainer.trained import sample_checkpoint

CPU = torch.device("cpu")
SMALL = [
    "tracking.mlflow=false",
    "train.batch=16",
    "model.width=16",
    "model.depth=1",
    "model.heads=1",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vae` and `other`, autoencoders of grey images; `latents`, the encoded 8x8 digits."""
    root = tmp_path_factory.mktemp("made")
    networks.save_autoencoder(root / "vae", image_channels=1)
    networks.save_autoencoder(root / "other", image_channels=1, seed=1)
    settings = Settings(
        image_size=8, decoder="auto", dtype="float32", precision="fp32", posterior="mean",
        max_tokens=1,
    )  # fmt: skip
    job = open_job(
        ["embedded:digits8/*.tar"], str(root / "latents"), settings, autoencoder=root / "vae",
        text=None, threads=1, batch=100, skip_bad=False, device=CPU,
    )  # fmt: skip
    encode(job, rank=0, ranks=1, report=lambda name, outcome: None)
    return root


def recipe_of_latents(made: Path, *overrides: str) -> Recipe:
    latents = made / "latents"
    return load_recipe(
        "digits8",
        [
            *SMALL,
            f"data.train={latents}/train-*.tar",
            f"data.heldout={latents}/heldout-*.tar",
            "data.latents=true",
            "data.image_size=4",
            "data.channels=4",
            "sample.every=0",
            *overrides,
        ],
    )


class Trained:
    """A model that is trained by plain gradient descent on whatever batches it is given."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.model = plan(recipe, 1).model.build()
        for parameter in self.model.parameters():
            # The final layer begins at zero, where the loss would not depend on the input.
            torch.nn.init.normal_(parameter, std=0.2)
        self.objective = build_objective(recipe)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02)

    def step(self, batch: Batch, step: int) -> Tensor:
        """(batch,) the losses before the step."""
        prepared = self.objective.prepare(batch, Draw(0, step, batch.position))
        losses = self.objective.loss(self.model(**prepared.inputs), prepared.targets)
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()
        return losses.detach()


def test_training_on_latents_equals_encoding_in_the_loop(made: Path) -> None:
    recipe = recipe_of_latents(made)
    images = load_recipe("digits8", [*SMALL, "data.decoder=auto"])
    stored, online = (open_loader(plan(r, 1), 0, 1, CPU) for r in (recipe, images))
    autoencoder = Autoencoder(made / "vae", precision="fp32", device=CPU)
    first, second = Trained(recipe), Trained(recipe)
    before = None
    with stored, online:
        for step in range(8):
            a, b = next(stored), next(online)
            assert a.position.tolist() == b.position.tolist()
            assert a.label.tolist() == b.label.tolist()
            latent = autoencoder.encode(b.image)[0]
            latent = scaled(latent, shift=autoencoder.shift, scale=autoencoder.scale)
            torch.testing.assert_close(a.image, latent, rtol=0, atol=1e-6)
            losses = first.step(a, step)
            assert losses.std() > 1e-3
            other = second.step(Batch(latent, b.label, b.position), step)
            torch.testing.assert_close(losses, other, rtol=1e-6, atol=1e-6)
            assert before is None or not torch.equal(losses, before)
            before = losses
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_scaling_is_undone_by_decoding(made: Path) -> None:
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    there = scaled(latents, shift=0.1, scale=1.5)
    torch.testing.assert_close(unscaled(there, shift=0.1, scale=1.5), latents)
    autoencoder = Autoencoder(made / "vae", precision="fp32", device=CPU)
    recipe = recipe_of_latents(made, f"data.autoencoder={made}/vae")
    images = to_images(recipe, there, CPU)
    assert images.shape == (3, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(images, autoencoder._model.decode(latents).sample)


def test_a_run_on_latents_makes_pictures_of_images(made: Path, tmp_path: Path) -> None:
    recipe = recipe_of_latents(
        made, f"run.dir={tmp_path}/run", f"data.autoencoder={made}/vae", "train.steps=3",
        "sample.every=3", "sample.count=10",
    )  # fmt: skip
    with ProgressLine(3, 1) as progress:
        assert run_training(recipe, 1, progress).finished
    run = RunFolder(tmp_path / "run")
    assert Image.open(run.samples / "step-00000003.png").size[0] > 8
    assert sample_checkpoint(run, recipe, 4).images.shape == (4, 1, 8, 8)
    judged = judge_run(run, recipe, 10, batch=10, ranks=Ranks(0, 1, 0, CPU), report=lambda *_: None)
    assert judged is not None
    samples, verdict = judged
    assert samples.images.shape[1:] == (1, 8, 8)
    # A classifier of what the autoencoder keeps of the digits is better than a guess.
    assert verdict.classes.heldout_accuracy > 0.2
    blind = recipe.model_copy(update={"data": recipe.data.model_copy(update={"autoencoder": None})})
    with pytest.raises(
        UserError, match=r"only their autoencoder makes images .* data\.autoencoder"
    ):
        sample_checkpoint(run, blind, 4)


def test_what_does_not_fit_is_refused_before_training(made: Path, tmp_path: Path) -> None:
    for override, words in {
        "data.image_size=8": r"latents of shape \(4, 4, 4\).* set 4 and 4",
        "data.channels=3": r"data\.channels = 3 .* set 4 and 4",
        f"data.autoencoder={made}/other": "is not the one that made the latents",
        "data.train=embedded:digits8/train-*.tar": r"digits8: has no dataset\.json that describes latents",
    }.items():
        with pytest.raises(UserError, match=words):
            plan(recipe_of_latents(made, override), 1)
    for override, words in {
        "data.augment.flip=0.5": r"the mirror image of a latent .* data\.augment\.flip=0",
        "data.augment.crop=random": r"a part of a latent .* data\.augment\.crop=centre",
        "data.latents=false": r"data\.channels = 4, and images have 1 or 3",
        "sample.every=5": r"set data\.autoencoder to its folder, or sample\.every=0",
    }.items():
        with pytest.raises(UserError, match=words):
            recipe_of_latents(made, override)
    with pytest.raises(UserError, match=r"the model is trained on images; set data\.latents=true"):
        load_recipe("digits8", [f"data.autoencoder={made}/vae"])
    lonely = tmp_path / "train-0.tar"
    lonely.write_bytes((made / "latents" / "heldout-000000.tar").read_bytes())
    with pytest.raises(UserError, match=r"has no dataset\.json that describes latents"):
        plan(recipe_of_latents(made, f"data.train={lonely}"), 1)
    (made / "latents" / "stray.tar").write_bytes(lonely.read_bytes())
    with pytest.raises(
        UserError, match=r"stray\.tar: is none of the shards that dataset\.json desc"
    ):
        plan(recipe_of_latents(made, f"data.train={made}/latents/*.tar"), 1)
    with pytest.raises(
        UserError, match=r"latents holds latents and no images; set data\.latents=true"
    ):
        plan(load_recipe("digits8", [*SMALL, f"data.train={made}/latents/train-*.tar"]), 1)
