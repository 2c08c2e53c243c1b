"""A small autoencoder of one's own, for data that no published one suits or that cannot be fetched.

An AutoencoderKL (Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models",
appendix G) fitted by absolute error and a little Kullback-Leibler divergence, without the perceptual
and adversarial losses of published ones: good for small pictures, blurred for photographs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.storing import reason
from flows.errors import UserError
from flows.randomness import Draw

WARM_UP = 100
LARGEST_NORM = 1.0


def fit_autoencoder(
    images: Tensor,
    folder: Path,
    *,
    widths: tuple[int, ...],
    channels: int,
    steps: int,
    batch: int,
    learning_rate: float,
    divergence: float,
    seed: int,
    device: torch.device,
    note: Callable[[int, float], None],
) -> float:
    """Fit to (n, channels, height, width) images in [-1, 1] and save; the mean absolute error at the end.

    folder: gets `config.json` and safetensors, with the shift and scale of the latents of `images`
    widths: channels of the network at each resolution; each after the first halves the side
    channels: of the latents
    divergence: weight of the Kullback-Leibler divergence to N(0, 1), a mean over latent numbers
    note: told (step, loss) now and then

    Raises UserError where diffusers is missing.
    """
    # diffusers draws first weights from PyTorch's global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _fresh(images.shape[1], images.shape[-1], widths, channels).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1.0 - 0.95 * step / steps)
    )
    images = images.to(device)
    places = torch.arange(batch, device=device)
    for step in range(steps):
        draw = Draw(seed, step, places)
        wanted = images[(draw.uniform("image") * len(images)).long()]
        posterior = model.encode(wanted).latent_dist
        latent = posterior.mean + posterior.std * draw.normal("latent", posterior.mean.shape[1:])
        error = (model.decode(latent).sample - wanted).abs().mean()
        loss = error + divergence * posterior.kl().mean() / latent[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            note(step, loss.item())
    # Stored in half the bytes; the error is that of the stored weights.
    return _save(model.half().float().eval(), images, folder, batch)


@torch.no_grad()
def _save(model: Any, images: Tensor, folder: Path, batch: int) -> float:
    """Write the network with what brings its latents to mean 0 and deviation 1; its mean error."""
    latents, errors = [], []
    for part in images.split(batch):
        latent = model.encode(part).latent_dist.mean
        latents.append(latent)
        errors.append((model.decode(latent).sample.clamp(-1, 1) - part).abs().mean(dim=(1, 2, 3)))
    together = torch.cat(latents)
    shift, scale = together.mean().item(), 1.0 / together.std().item()
    model.register_to_config(shift_factor=shift, scaling_factor=scale)
    model.half().cpu().save_pretrained(str(folder), safe_serialization=True)
    return torch.cat(errors).mean().item()


def _fresh(image_channels: int, side: int, widths: tuple[int, ...], channels: int) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            f"an autoencoder needs the diffusers package ({reason(error)}); pip install 'flowmill[encode]'"
        ) from error
    return AutoencoderKL(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=min(16, *widths),
        sample_size=side,
        mid_block_add_attention=False,
    )
