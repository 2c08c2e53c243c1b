"""Samples of normalizing flows from their checkpoints: the same however tokens are solved for."""

import pytest
import torch

from tests.trainer import families, runs
from trainer.prior import measured_variance
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
