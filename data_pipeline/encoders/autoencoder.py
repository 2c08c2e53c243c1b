"""The autoencoder of latent models (Rombach et al. 2022): images to latents and back.

A `diffusers` AutoencoderKL from a local folder. Latents are stored as the encoder gave them; a model
is trained on (latent - shift) * scale, whose standard deviation is near one.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.encoders.weights import DAMAGE, check_complete, fingerprint, read_config
from data_pipeline.latents import unscaled
from data_pipeline.storing import reason
from flows.errors import UserError

KIND = "AutoencoderKL"
WHAT = "a diffusers AutoencoderKL (config.json and *.safetensors)"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Autoencoder:
    """A frozen autoencoder on one device.

    image_channels, channels: of its images and of its latents
    factor: pixels a side of what one place of a latent stands for
    shift, scale: what its configuration says brings latents near mean 0 and deviation 1
    fingerprint: hash of configuration and weights

    Raises UserError if the folder holds no whole AutoencoderKL in safetensors.
    """

    def __init__(
        self, folder: Path, *, precision: Literal["fp32", "bf16"], device: torch.device
    ) -> None:
        kind = read_config(folder, WHAT).get("_class_name")
        if kind != KIND:
            raise UserError(f"{folder}: holds {kind}; give the folder of {WHAT}")
        self.device = device
        self.fingerprint = fingerprint(folder)
        self._dtype = DTYPES[precision]
        self._model = _load(folder, self._dtype).to(device)
        config = self._model.config
        self.image_channels = int(config["in_channels"])
        if self.image_channels not in (1, 3):
            raise UserError(
                f"{folder}: encodes images of {self.image_channels} channels, and images have "
                "1 or 3; give another"
            )
        self.channels = int(config["latent_channels"])
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.scale = float(config["scaling_factor"])

    @torch.inference_mode()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of (batch, channels, height, width) images.

        images: in [-1, 1]
        Returns two float32 tensors (batch, latent channels, height / factor, width / factor)
        """
        posterior = self._model.encode(images.to(self.device, self._dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """(batch, channels, height, width) float32 images of latents as a model is trained on."""
        raw = unscaled(latents.to(self.device), shift=self.shift, scale=self.scale)
        images: Tensor = self._model.decode(raw.to(self._dtype)).sample
        return images.float()


def _load(folder: Path, dtype: torch.dtype) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            f"encoding needs the diffusers package ({reason(error)}); pip install 'flowmill[encode]'"
        ) from error
    try:
        model, report = AutoencoderKL.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=dtype,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except DAMAGE as error:
        raise UserError(
            f"{folder}: the autoencoder cannot be loaded ({reason(error)}); copy it again"
        ) from error
    check_complete(folder, report["missing_keys"])
    return model.eval().requires_grad_(False)
