"""Images to features, by a vision transformer of `transformers` from a local folder, such as DINOv2."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.encoders.weights import DAMAGE, check_complete, fingerprint, read_config
from data_pipeline.storing import reason
from flows.errors import UserError
from flows.metrics.features import Features

WHAT = "a DINOv2, ViT or CLIP vision encoder (config.json and *.safetensors)"
KINDS = ("dinov2", "dinov2_with_registers", "vit", "clip_vision_model")
# Of ImageNet, which DINOv2 was trained with; a preprocessor_config.json may say otherwise.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224


def vision_features(folder: Path, *, device: torch.device) -> Features:
    """The class token of the last layer, as distances of features take it; float32 throughout.

    Images of 1 or 3 channels are resized (bicubic, antialiased) and normalised as the folder's
    preprocessor_config.json says. Raises UserError if the folder holds no whole encoder in safetensors.
    """
    kind = read_config(folder, WHAT).get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder}: holds {kind}; give the folder of {WHAT}")
    model = _load(folder).to(device)
    side, mean, std = _preprocessing(folder, model.config)
    centre, spread = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))

    @torch.inference_mode()
    def extract(images: Tensor) -> Tensor:
        x = images.to(device, torch.float32).expand(-1, 3, -1, -1)
        x = F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        found = model(pixel_values=((x + 1) / 2 - centre) / spread)
        # CLIP's norm comes after its class token is taken.
        token = found.pooler_output if "clip" in kind else found.last_hidden_state[:, 0]
        features: Tensor = token.double()
        return features

    width = int(model.config.hidden_size)
    return Features(f"{kind}{width}-{fingerprint(folder)[:8]}", extract)


def _preprocessing(folder: Path, config: Any) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side, mean and standard deviation of what the encoder wants to see."""
    import json

    path = folder / "preprocessor_config.json"
    if not path.exists():
        return min(int(config.image_size), SIDE), MEAN, STD
    try:
        said = json.loads(path.read_bytes())
        size = said.get("crop_size") or said.get("size") or {}
        side = int(size.get("height") or size.get("shortest_edge") or SIDE)
        mean, std = (tuple(map(float, said[key])) for key in ("image_mean", "image_std"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: does not say how to normalise images ({reason(error)}); copy it again"
        ) from error
    return side, mean, std


def _load(folder: Path) -> Any:
    """The frozen encoder; raises UserError naming the folder."""
    try:
        from transformers import AutoModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError(
            f"features of networks need the transformers package ({reason(error)}); "
            "pip install 'flowmill[encode]'"
        ) from error
    disable_progress_bar()
    try:
        model, report = AutoModel.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except DAMAGE as error:
        raise UserError(
            f"{folder}: the vision encoder cannot be loaded ({reason(error)}); copy it again"
        ) from error
    check_complete(folder, {key for key in report["missing_keys"] if "pooler" not in key})
    return model.eval().requires_grad_(False)
