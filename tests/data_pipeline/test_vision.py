"""Features of a local vision transformer: loaded whole, from tensors alone, and of each image by itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from data_pipeline.encoders.vision import vision_features
from flows.errors import UserError

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(root / "dino")
        clip = CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **SIZES))
        clip.save_pretrained(root / "clip")
    settings = {
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "size": {"height": 42, "width": 42},
    }
    shutil.copytree(root / "dino", root / "prepared")
    (root / "prepared" / "preprocessor_config.json").write_text(json.dumps(settings))
    return root


def images(count: int, channels: int = 3, side: int = 28) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, channels, side, side, generator=generator) * 2 - 1


def test_features_are_the_class_token_of_the_normalised_image(folders: Path) -> None:
    model = Dinov2Model.from_pretrained(folders / "dino").eval()
    x = images(3)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(pixel_values=((x + 1) / 2 - mean) / std).pooler_output
    features = vision_features(folders / "dino", device=CPU)
    assert features.name.startswith("dinov216-")
    torch.testing.assert_close(features.extract(x), expected.double(), rtol=1e-4, atol=1e-5)
    clip = CLIPVisionModel.from_pretrained(folders / "clip").eval()
    with torch.no_grad():
        expected = clip(pixel_values=((x + 1) / 2 - mean) / std).pooler_output
    found = vision_features(folders / "clip", device=CPU).extract(x)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)


def test_the_folder_says_how_images_are_prepared(folders: Path) -> None:
    model = Dinov2Model.from_pretrained(folders / "prepared").eval()
    x = images(2, side=42)
    with torch.no_grad():
        expected = model(pixel_values=((x + 1) / 2 - 0.5) / 0.25).last_hidden_state[:, 0]
    found = vision_features(folders / "prepared", device=CPU).extract(x)
    torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-5)


def test_any_size_one_channel_and_any_company_will_do(folders: Path) -> None:
    features = vision_features(folders / "dino", device=CPU)
    grey = images(5, channels=1, side=10)
    found = features.extract(grey)
    assert found.shape == (5, 16)
    assert found.dtype == torch.float64
    torch.testing.assert_close(features.of(grey, chunk=2), found, rtol=1e-4, atol=1e-5)
    colour = features.extract(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(colour, found, rtol=1e-4, atol=1e-5)


def test_a_vit_takes_images_of_its_own_size_and_a_whole_clip_gives_its_vision_half(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = SIZES | {"image_size": 256, "patch_size": 64}
    ViTModel(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    assert vision_features(tmp_path / "vit", device=CPU).extract(images(2)).shape == (2, 16)
    vision = {"intermediate_size": 32, **SIZES}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    whole.save_pretrained(tmp_path / "whole")
    CLIPVisionModel.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "half")
    capfd.readouterr()
    found, half = (
        vision_features(tmp_path / name, device=CPU).extract(images(2))
        for name in ("whole", "half")
    )
    assert torch.equal(found, half)
    assert capfd.readouterr().err == "", "what is left over of the text half is as it should be"


def prepared(folder: Path, **changes: object) -> Path:
    path = folder / "preprocessor_config.json"
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": 42} | changes
    path.write_text(json.dumps(settings))
    return folder


def test_a_preparation_that_gives_no_features_is_refused_at_once(
    folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "dino", tmp_path / "dino")
    assert (
        vision_features(prepared(tmp_path / "dino"), device=CPU).extract(images(1)).isfinite().all()
    )
    for changes, says in (
        ({"image_std": [0.0] * 3}, "not finite; see image_std"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "a number for each of 3 channels"),
        ({"size": {"height": -4}}, "does not take images as its preprocessor_config"),
    ):
        with pytest.raises(UserError, match=says):
            vision_features(prepared(tmp_path / "dino", **changes), device=CPU)


def test_what_is_no_whole_encoder_is_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no folder with a config\.json"):
        vision_features(tmp_path / "nothing", device=CPU)
    other = tmp_path / "other"
    shutil.copytree(folders / "dino", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(UserError, match="holds bert; give the folder of a DINOv2"):
        vision_features(other, device=CPU)
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="its weights lack"):
        vision_features(other, device=CPU)
    (other / "config.json").write_text(json.dumps(config))
    (other / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="does not say how to normalise"):
        vision_features(other, device=CPU)
    weights = next(other.glob("*.safetensors"))
    weights.rename(other / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no .safetensors weights"):
        vision_features(other, device=CPU)
