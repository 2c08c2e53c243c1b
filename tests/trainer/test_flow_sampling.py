"""Samples of normalizing flows from their checkpoints: the same however tokens are solved for."""

import pytest
import torch

from flows.errors import UserError
from flows.initialise import initialise
from flows.samplers.inversion import prior
from tests.trainer import families, runs
from trainer.assembly import build_objective, model_architecture, plan
from trainer.drawing import Shared, draw_samples, find_shared
from trainer.prior import measured_variance
from trainer.recipe import load_recipe, override_recipe
from trainer.run_folder import RunFolder, open_run
from trainer.sampling import with_overrides
from trainer.trained import load_trained, sample_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["tarflow", "volume-preserving"])
def trained(request, tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("flow") / request.param
    runs.train_here(families.recipe(request.param, folder))
    return open_run(str(folder))[0]


def drawn(run: RunFolder, *changes: str) -> torch.Tensor:
    recipe = with_overrides(open_run(str(run.root))[1], list(changes))
    return sample_checkpoint(run, recipe, 6).images


def test_every_strategy_draws_the_same_samples(trained):
    exact = drawn(trained, "sample.strategy=sequential")
    for strategy in ("jacobi", "gs_jacobi", "sliding", "auto"):
        found = drawn(
            trained, f"sample.strategy={strategy}", "sample.group=2", "sample.tolerance=0"
        )
        # `auto` may take one that is off by its accuracy, block for block.
        tolerance = 1e-2 if strategy == "auto" else 1e-5
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    assert exact.std() > 0.1


def test_the_last_step_takes_noise_away(trained):
    noisy, clean = drawn(trained, "sample.denoise=0"), drawn(trained, "sample.denoise=1")
    assert 1e-3 < (noisy - clean).abs().mean() < 0.2


def test_the_prior_of_a_volume_preserving_flow_is_as_wide_as_data(trained):
    recipe = open_run(str(trained.root))[1]
    if not getattr(recipe.model, "volume_preserving", None):
        return
    flow = load_trained(trained, recipe, CPU, batch=4).model
    variance = measured_variance(flow, recipe, CPU)
    assert variance.shape == (4, 16)
    # Samples go back to noise as wide as it says: 384 numbers tell their variance to 7 %.
    noisy = drawn(trained, "sample.denoise=0", "sample.guidance=0")
    z = flow(noisy, label=torch.arange(6)).z
    assert 0.7 < (z.square() / variance).mean() < 1.3
    assert not 0.7 < z.square().mean() < 1.3, "a variance of 1 would do as well"


def test_samples_are_denoised_by_the_prior_they_are_drawn_from():
    """A fresh flow that preserves volume is the identity, whose samples Tweedie's formula tells."""
    noise = 0.2
    recipe = load_recipe(
        "tarflow_digits",
        [
            "model.volume_preserving=true",
            "model.width=64",
            f"objective.noise={noise}",
            "sample.guidance=0",
        ],
    )
    architecture = model_architecture(recipe)
    model = architecture.build()
    initialise(model, seed=0)
    for block in model.flow_blocks:
        block.project_out.weight.data.zero_()
        block.project_out.bias.data.zero_()
    shape = architecture.config.tokens, architecture.config.features
    variance = torch.linspace(0.3, 2.0, shape[0] * shape[1]).view(shape)
    ids = torch.arange(3)

    def with_denoise(share: float) -> torch.Tensor:
        changed = override_recipe(recipe, [f"sample.denoise={share}"])
        shared = Shared(variance)
        return draw_samples(model, changed, ids, CPU, batch=3, as_images=True, shared=shared).images

    noisy = with_denoise(0)
    z = prior(model, recipe.seed, ids, variance)
    torch.testing.assert_close(noisy, model.image(z))
    torch.testing.assert_close(with_denoise(1), model.image(z * (1 - noise**2 / variance)))


def test_latents_are_not_dequantised():
    """By a key that is set: the default is none of them, and stands in every recipe of a run."""
    uniform = load_recipe("starflow_emoji", [])
    assert (uniform.objective.dequantisation, build_objective(uniform).dequantisation) == (
        "uniform",
        "none",
    )
    changes = ["objective.dequantisation=variational", "objective.noise=0"]
    with pytest.raises(UserError, match="= variational fills the bins of pixels, and latents have"):
        plan(load_recipe("starflow_emoji", changes), 1)


def test_the_prior_is_measured_behind_a_dequantiser():
    recipe = load_recipe(
        "tarflow_bits",
        [
            "model.volume_preserving=true",
            "model.width=64",
            "objective.dequantisation=variational",
            "data.train=embedded:digits28/train-000000.tar",
            "sample.strategy=sequential",
        ],
    )
    architecture = model_architecture(recipe)
    model = architecture.build()
    initialise(model, seed=0)
    variance = find_shared(model, recipe, CPU, batch=2).variance
    assert variance.shape == (architecture.config.tokens, architecture.config.features)
    assert variance.min() > 0


@pytest.mark.parametrize(
    ("key", "value"), [("guidance", "3.0"), ("strategy", "'jacobi'"), ("clamp", "2.0")]
)
def test_a_jet_refuses_what_it_cannot_follow(key, value):
    change = f"sample.{key}={value}"
    with pytest.raises(UserError, match=rf"sample\.{key} = {value} is for .* family jet .*; drop"):
        load_recipe("jet_digits", [change, "objective.label_drop=0.1"])
    load_recipe("tarflow_digits", [change])
    load_recipe(
        "jet_digits", ["sample.denoise=0.5", "sample.guidance=0", "sample.strategy=sequential"]
    )


def test_a_key_of_another_family_is_said_to_be_one():
    families = "dit, dit_moe, mmdit, token_dit"
    with pytest.raises(UserError) as refused:
        load_recipe("tarflow_digits", ["sample.steps=3"])
    assert str(refused.value) == (
        f"command line: sample.steps is a key of the families {families}, and not of the family of this "
        "recipe; drop it, or change the family."
    )
    with pytest.raises(
        UserError, match=r"sample\.strategy is a key of the families tarflow, starflow,"
    ):
        load_recipe("digits8", ["sample.strategy=jacobi"])
