"""An autoencoder of one's own learns, and is one that encoding takes."""

import torch

from data_pipeline.encoders.autoencoder import Autoencoder
from data_pipeline.encoders.fit import fit_autoencoder


def fitted(folder, steps: int) -> tuple[torch.Tensor, float]:
    x = torch.linspace(-1, 1, 8)
    # Ramps in all directions: pictures that four numbers a place can hold.
    slopes = torch.randn(32, 2, 1, 1, generator=torch.Generator().manual_seed(0)).sin()
    images = (slopes[:, :1] * x.view(1, 1, 8, 1) + slopes[:, 1:] * x.view(1, 1, 1, 8)).clamp(-1, 1)
    error = fit_autoencoder(
        images, folder, widths=(16, 16), channels=2, steps=steps, batch=16, learning_rate=3e-3,
        divergence=1e-3, seed=0, device=torch.device("cpu"), note=lambda step, loss: None,
    )  # fmt: skip
    return images, error


def test_a_fitted_autoencoder_gives_images_back_and_says_how_well(tmp_path):
    images, fresh = fitted(tmp_path / "fresh", steps=1)
    torch.manual_seed(7)  # what the process has drawn before is no part of it
    _, again = fitted(tmp_path / "again", steps=1)
    assert again == fresh
    _, error = fitted(tmp_path / "fitted", steps=60)
    assert error < 0.5 * fresh
    loaded = Autoencoder(tmp_path / "fitted", precision="fp32", device=torch.device("cpu"))
    assert (loaded.channels, loaded.factor, loaded.image_channels) == (2, 2, 1)
    mean, _ = loaded.encode(images)
    latents = (mean - loaded.shift) * loaded.scale
    assert abs(latents.mean()) < 0.01
    assert abs(latents.std() - 1) < 0.01
    back = loaded.decode(latents).clamp(-1, 1)
    assert abs((back - images).abs().mean().item() - error) < 1e-3
