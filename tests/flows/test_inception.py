"""Inception's features from a file of weights: the network of FID, and no file that could run code."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flows.errors import UserError
from flows.metrics.inception import inception_features, trunk

CPU = torch.device("cpu")


def _block_c(inner: int) -> dict[str, tuple[int, int, int, int]]:
    seven = {
        f"branch7x7_{i}": shape
        for i, shape in enumerate(
            ((768, inner, 1, 1), (inner, inner, 1, 7), (inner, 192, 7, 1)), start=1
        )
    }
    double = {
        f"branch7x7dbl_{i}": shape
        for i, shape in enumerate(
            (
                (768, inner, 1, 1),
                (inner, inner, 7, 1),
                (inner, inner, 1, 7),
                (inner, inner, 7, 1),
                (inner, 192, 1, 7),
            ),
            start=1,
        )
    }
    return {
        "branch1x1": (768, 192, 1, 1),
        **seven,
        **double,
        "branch_pool": (768, 192, 1, 1),
    }


def _block_a(inputs: int, pool: int) -> dict[str, tuple[int, int, int, int]]:
    return {
        "branch1x1": (inputs, 64, 1, 1),
        "branch5x5_1": (inputs, 48, 1, 1),
        "branch5x5_2": (48, 64, 5, 5),
        "branch3x3dbl_1": (inputs, 64, 1, 1),
        "branch3x3dbl_2": (64, 96, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (inputs, pool, 1, 1),
    }


def _block_e(inputs: int) -> dict[str, tuple[int, int, int, int]]:
    return {
        "branch1x1": (inputs, 320, 1, 1),
        "branch3x3_1": (inputs, 384, 1, 1),
        "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1),
        "branch3x3dbl_1": (inputs, 448, 1, 1),
        "branch3x3dbl_2": (448, 384, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3),
        "branch3x3dbl_3b": (384, 384, 3, 1),
        "branch_pool": (inputs, 192, 1, 1),
    }


BLOCKS = {
    "Mixed_5b": _block_a(192, 32),
    "Mixed_5c": _block_a(256, 64),
    "Mixed_5d": _block_a(288, 64),
    "Mixed_6a": {
        "branch3x3": (288, 384, 3, 3),
        "branch3x3dbl_1": (288, 64, 1, 1),
        "branch3x3dbl_2": (64, 96, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    },
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": {
        "branch3x3_1": (768, 192, 1, 1),
        "branch3x3_2": (192, 320, 3, 3),
        "branch7x7x3_1": (768, 192, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7),
        "branch7x7x3_3": (192, 192, 7, 1),
        "branch7x7x3_4": (192, 192, 3, 3),
    },
    "Mixed_7b": _block_e(1280),
    "Mixed_7c": _block_e(2048),
}
STEM = {
    "Conv2d_1a_3x3": (3, 32, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3, 3),
    "Conv2d_2b_3x3": (32, 64, 3, 3),
    "Conv2d_3b_1x1": (64, 80, 1, 1),
    "Conv2d_4a_3x3": (80, 192, 3, 3),
}


def wave(count: int, phase: float) -> Tensor:
    return torch.sin(0.7 * torch.arange(count, dtype=torch.float64) + phase).float()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Names and sizes as published; values from a sine, alike on every machine."""
    layers = STEM | {
        f"{block}.{name}": shape for block, names in BLOCKS.items() for name, shape in names.items()
    }
    found = {}
    for number, (name, (inputs, outputs, height, width)) in enumerate(layers.items()):
        fan_in = inputs * height * width
        kernel = wave(outputs * fan_in, number) * 2 / fan_in**0.5
        found[f"{name}.conv.weight"] = kernel.view(outputs, inputs, height, width)
        found[f"{name}.bn.weight"] = 1 + 0.3 * wave(outputs, number + 0.1)
        found[f"{name}.bn.bias"] = 0.1 * wave(outputs, number + 0.2)
        found[f"{name}.bn.running_mean"] = 0.1 * wave(outputs, number + 0.3)
        found[f"{name}.bn.running_var"] = 1 + 0.5 * wave(outputs, number + 0.4)
        found[f"{name}.bn.num_batches_tracked"] = torch.tensor(1)
    found["fc.weight"], found["fc.bias"] = torch.zeros(1008, 2048), torch.zeros(1008)
    return found


@pytest.fixture(scope="module")
def file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(weights, path)
    return path


def test_the_trunk_has_the_published_number_of_weights(weights) -> None:
    learned = [
        value.numel()
        for name, value in weights.items()
        if name.endswith(("conv.weight", "bn.weight", "bn.bias"))
    ]
    assert sum(learned) == 21_785_568


def test_features_are_those_of_the_network_of_fid(weights) -> None:
    """The numbers are those of `trunk` when it gave the same bits as the network of torch-fidelity 0.4
    for random weights."""
    x = wave(3 * 299 * 299, 0.0).view(1, 3, 299, 299)
    found = trunk(weights, x)
    assert found.shape == (1, 2048)
    picked = found[0, [3, 500, 1000, 2047]]
    expected = torch.tensor([971.92206, 0.0, 26.738926, 0.0096990])
    torch.testing.assert_close(picked, expected, rtol=1e-3, atol=1e-3)
    assert found.mean().item() == pytest.approx(218.4539, rel=1e-3)


def test_images_of_any_size_and_of_one_channel_have_features(file: Path) -> None:
    features = inception_features(file, device=CPU)
    assert features.name.startswith("inception2048-")
    grey = wave(2 * 64, 1.0).view(2, 1, 8, 8)
    found = features.extract(grey)
    assert found.dtype == torch.float64
    assert found.shape == (2, 2048)
    colour = features.extract(grey[:1].expand(-1, 3, -1, -1))
    torch.testing.assert_close(colour, found[:1], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_a_state_dictionary_of_torch_is_read_as_tensors_alone(weights, file, tmp_path) -> None:
    path = tmp_path / "inception.pth"
    torch.save({name: value for name, value in weights.items() if "Mixed_7" not in name}, path)
    with pytest.raises(UserError, match=r"is not Inception v3 .*Mixed_7a.branch3x3_1"):
        inception_features(path, device=CPU)
    for content in (b"", b"nonsense", b"hello", pickle.dumps({"weight": Path("x")})):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as tensors"):
            inception_features(path, device=CPU)
    with pytest.raises(UserError, match="cannot be read as tensors"):
        inception_features(tmp_path / "nothing.safetensors", device=CPU)
    torch.save({"model": {"a": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match="holds no state dictionary"):
        inception_features(path, device=CPU)


def test_another_network_is_refused(weights, tmp_path) -> None:
    path = tmp_path / "narrow.pth"
    narrow = dict(weights)
    for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"):
        name = f"Mixed_7c.branch1x1.{part}"
        narrow[name] = weights[name][:100].clone()
    torch.save(narrow, path)
    with pytest.raises(UserError, match="gives 1828 features, not the 2048"):
        inception_features(path, device=CPU)
