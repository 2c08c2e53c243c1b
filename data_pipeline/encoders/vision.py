"""Images to features, by a vision transformer of `transformers` from a local folder, such as DINOv2."""

from collections.abc import Callable
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
KINDS = ("dinov2", "dinov2_with_registers", "vit", "clip", "clip_vision_model")
# Of ImageNet, which DINOv2 was trained with; a preprocessor_config.json may say otherwise.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224  # of DINOv2, which takes any size


def vision_features(folder: Path, *, device: torch.device) -> Features:
    """The class token of the last layer, as distances of features take it; float32 throughout.

    Images of 1 or 3 channels are resized (bicubic, antialiased) and normalised as the folder's
    preprocessor_config.json says. Of a whole CLIP, the vision half.

    Raises UserError if the folder holds no whole encoder in safetensors, or one that does not take such
    images.
    """
    kind = read_config(folder, WHAT).get("model_type")
    if kind not in KINDS:
        raise UserError(f"{folder}: holds {kind}; give the folder of {WHAT}")
    model = _load(folder, kind).to(device)
    side, mean, std = _preprocessing(folder, kind, model.config)
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

    _try(folder, extract)
    width = int(model.config.hidden_size)
    return Features(f"{kind}{width}-{fingerprint(folder)[:8]}", extract)


def _try(folder: Path, extract: Callable[[Tensor], Tensor]) -> None:
    """UserError, before anything else is done, where the encoder gives no features of an image."""
    try:
        found = extract(torch.zeros(1, 3, SIDE, SIDE))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder}: its encoder does not take images as its preprocessor_config.json prepares them "
            f"({reason(error)}); correct that, or take the file away"
        ) from error
    if not found.isfinite().all():
        raise UserError(
            f"{folder}: its features of a grey image are not finite; see image_std in its "
            "preprocessor_config.json, or copy the weights again"
        )


def _preprocessing(
    folder: Path, kind: str, config: Any
) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side, mean and standard deviation of what the encoder wants to see."""
    import json

    path = folder / "preprocessor_config.json"
    if not path.exists():
        own = int(config.image_size)
        return min(own, SIDE) if kind.startswith("dinov2") else own, MEAN, STD
    try:
        said = json.loads(path.read_bytes())
        size = said.get("crop_size") or said.get("size") or {}
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge") or SIDE
        side = int(size)
        mean, std = (tuple(map(float, said[key])) for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3:
            raise ValueError("image_mean and image_std have a number for each of 3 channels")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: does not say how to normalise images ({reason(error)}); copy it again"
        ) from error
    return side, mean, std


def _load(folder: Path, kind: str) -> Any:
    """The frozen encoder; raises UserError naming the folder."""
    try:
        from transformers import AutoModel, CLIPVisionModel
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            f"features of networks need the transformers package ({reason(error)}); "
            "pip install 'flowmill[encode]'"
        ) from error
    logging.disable_progress_bar()
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told below, and what is left over is right
    try:
        model, report = (CLIPVisionModel if "clip" in kind else AutoModel).from_pretrained(
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
    finally:
        logging.set_verbosity(told)
    check_complete(folder, {key for key in report["missing_keys"] if "pooler" not in key})
    return model.eval().requires_grad_(False)
