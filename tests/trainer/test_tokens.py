"""Models over tokens are trained, sampled and laid over ranks like any other."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flows.errors import UserError
from flows.mixture import to_image, to_tokens
from parallel.activation import Recompute
from parallel.engines import native
from parallel.mesh import build_mesh, resolve_layout
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.parallel import scenario
from tests.trainer import runs
from trainer.assembly import build_discrete, plan
from trainer.drawing import Shared, draw_samples
from trainer.recipe import Recipe, load_recipe
from trainer.running import open_loader

TINY = ["model.width=16", "model.depth=2", "model.heads=2", "train.batch=8", "train.steps=3"]
QUIET = ["tracking.mlflow=false", "data.window=16", "sample.every=3", "sample.count=4"]
CPU = torch.device("cpu")


def recipe(folder: Any, *changes: str) -> Recipe:
    return load_recipe("tokens_digits8", [*TINY, *QUIET, f"run.dir={folder}", *changes])


def curve(strategy: str, ranks: int, folder: str, microbatch: int) -> dict[str, Any]:
    """Losses, weights and samples of the recipe on an engine of its own."""
    made = plan(recipe(folder), ranks)
    layout = resolve_layout(strategy, None, None, ranks)
    with torch.device("meta"):
        model = made.model.build()
    engine = native.build(
        model,
        layout,
        build_mesh(layout, CPU),
        replace(scenario.PLAIN, recompute=Recompute(1)),
        scenario.start(seed=1),
    )
    objective, losses = build_discrete(made.recipe), []
    with open_loader(made, engine.data_rank, ranks, CPU) as loader:
        for step in range(3):
            parts = list(next(loader).split(microbatch))
            result = engine.forward_backward(parts, objective, 1, step, 8)
            losses.append(engine.sum_over_data(result.loss.sum()) / 8)
            engine.clip_gradients(1.0)
            engine.step(1e-2, torch.zeros(()))
    ids = torch.arange(2)
    drawn = engine.run(
        lambda model: draw_samples(
            model, made.recipe, ids, CPU, batch=2, as_images=True, shared=Shared()
        ),
        whole=False,
    )
    return {
        "losses": torch.stack(losses),
        "weights": scenario.whole(engine.parameters()),
        "images": drawn.images,
    }


def on_ranks(ranks: Ranks, folder: str) -> dict[str, Any]:
    strategy = "none" if ranks.world_size == 1 else "fsdp"
    return curve(strategy, ranks.world_size, folder, microbatch=8 if strategy == "none" else 3)


def test_two_ranks_train_and_sample_as_one_does(tmp_path):
    one, two = (run_ranks(on_ranks, n, folder=str(tmp_path))[0] for n in (1, 2))
    assert scenario.relative(two["losses"], one["losses"]) <= 1e-5
    assert scenario.distance(two["weights"], one["weights"]) <= 1e-5
    # A token is drawn anew where a probability moves past its number by a rounding: not here.
    assert torch.equal(one["images"], two["images"])


def test_a_run_draws_images_of_its_levels(tmp_path):
    folder = tmp_path / "run"
    assert runs.train_here(recipe(folder)).finished
    assert [line["step"] for line in runs.lines(folder)] == [1, 2, 3]
    assert (folder / "samples" / "step-00000003.png").exists()


def test_the_digits_have_seventeen_levels(tmp_path):
    """So that their tokens hold all of them."""
    with open_loader(plan(recipe(tmp_path / "run"), 1), 0, 1, CPU) as loader:
        image = next(loader).image
    again = to_image(to_tokens(image, 17), 17, (1, 8, 8))
    assert (again - image).abs().max() <= 2 / 255  # as bytes round them
    assert len(to_tokens(image, 17).unique()) > 10


def test_latents_have_no_levels(tmp_path):
    latents = recipe(tmp_path / "run", "data.latents=true", "sample.every=0")
    with pytest.raises(UserError, match="latents do not have"):
        build_discrete(latents)
    with pytest.raises(UserError, match=r"model.levels not set"):
        plan(recipe(tmp_path / "run", "model.levels=null"), 1)
