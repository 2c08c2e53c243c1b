"""Published names have the published sizes, and the cost formula counts what runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flows.errors import UserError
from flows.models.dit import DiT, DiTConfig, forward_flops, parameter_count
from flows.models.family import architecture
from flows.models.zoo import DIT, family_of

# name, patch: all parameters (position table included), 10^9 multiply-adds of a forward;
# 32 x 32 x 4 latents, 1000 classes.
PUBLISHED = {
    ("S", 2): (32_963_360, 6.056),
    ("S", 4): (32_945_024, 1.413),
    ("S", 8): (33_148_160, 0.358),
    ("B", 2): (130_512_416, 23.005),
    ("B", 4): (130_475_648, 5.565),
    ("B", 8): (130_881_536, 1.418),
    ("L", 2): (458_102_816, 80.698),
    ("L", 4): (458_053_760, 19.696),
    ("L", 8): (458_594_816, 5.011),
    ("XL", 2): (675_129_632, 118.621),
    ("XL", 4): (675_074_432, 29.044),
    ("XL", 8): (675_683_072, 7.392),
}
LIGHTNING = [
    ("B/1", 130_556_192),
    ("B/2", 130_556_288),
    ("L/2", 458_153_056),
    ("XL/1", 675_256_736),
    ("XL/2", 675_256_832),
    ("1.0B/1", 1_029_401_120),
    ("1.6B/1", 1_631_767_120),
]
LATENTS = {"image_size": 32, "channels": 4, "classes": 1000, "text_width": 0, "text_tokens": 0}


def config(name: str | None, **changes) -> DiTConfig:
    data = {key: changes.pop(key, value) for key, value in LATENTS.items()}
    return architecture(DIT, name, changes, data).config


def on_meta(sizes: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(sizes)


@pytest.mark.parametrize("family", ["SiT", "DiT"])
@pytest.mark.parametrize(("name", "patch"), PUBLISHED)
def test_published_parameters_and_costs(family: str, name: str, patch: int) -> None:
    parameters, giga = PUBLISHED[name, patch]
    sizes = config(f"{family}-{name}/{patch}")
    assert parameter_count(on_meta(sizes), trainable_only=False) == parameters
    assert forward_flops(sizes) / 2e9 == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize(("name", "parameters"), LIGHTNING)
def test_published_parameters_of_lightning_dit(name: str, parameters: int) -> None:
    sizes = config(f"LightningDiT-{name}", image_size=16, channels=32)
    assert parameter_count(on_meta(sizes), trainable_only=False) == parameters


@pytest.mark.parametrize(
    ("name", "parameters", "projector"),
    [("B", 137_845_008, 7_344_896), ("L", 465_955_600, None), ("XL", 683_242_512, 8_131_328)],
)
def test_published_parameters_of_repa(name: str, parameters: int, projector: int | None) -> None:
    model = on_meta(config(f"REPA-SiT-{name}/2"))
    assert parameter_count(model, trainable_only=False) == parameters
    if projector is not None:
        assert sum(weight.numel() for weight in model.projector.parameters()) == projector


def test_published_trainable_and_other_totals() -> None:
    xl = on_meta(config("SiT-XL/2"))
    assert parameter_count(xl, trainable_only=True) == 674_834_720
    velocity_alone = on_meta(config("SiT-XL/2", learn_sigma=False))
    assert parameter_count(velocity_alone, trainable_only=False) == 675_111_184
    large = config("DiT-XL/2", image_size=64)
    assert parameter_count(on_meta(large), trainable_only=False) == 676_014_368
    assert forward_flops(large) / 2e9 == pytest.approx(524.54, rel=1e-3)


@pytest.mark.parametrize("name", ["SiT-XL/2", "SiT-S/8", "SiT-nano/4", "SiT-micro/7", "SiT-tiny/4"])
def test_the_cost_formula_equals_the_operator_count(name: str) -> None:
    size = (
        {"image_size": 28, "channels": 1, "classes": 10}
        if DIT.published[name]["width"] < 384
        else LATENTS
    )
    sizes = config(name, **size)
    model = on_meta(sizes)
    side = sizes.image_size
    with torch.device("meta"):
        x = torch.empty(3, sizes.channels, side, side)
        t, label = torch.empty(3), torch.empty(3, dtype=torch.int64)
    with FlopCounterMode(display=False) as forward:
        model(x, t, label)
    with FlopCounterMode(display=False) as train:
        model(x, t, label).sum().backward()
    assert forward.get_total_flops() / 3 == pytest.approx(forward_flops(sizes), rel=1e-3)
    # The images need no gradient, so the backward of the patch embedding is half of twice.
    assert train.get_total_flops() / 3 == pytest.approx(3 * forward_flops(sizes), rel=1e-2)


def test_every_name_builds_with_any_image_its_patch_divides() -> None:
    for name, size in DIT.published.items():
        sizes = config(name, image_size=2 * size["patch"], channels=1)
        assert len(on_meta(sizes).blocks) == size["depth"], name


def test_a_key_beside_a_name_changes_that_key_alone() -> None:
    named = config("DiT-S/2")
    assert vars(config("DiT-S/2", depth=3)) == vars(named) | {"depth": 3}
    assert vars(config("DiT-S/2", learn_sigma=False)) == vars(named) | {"learn_sigma": False}


def test_a_size_without_a_name_must_be_whole() -> None:
    assert config(None, patch=4, width=64, depth=2, heads=2) == DiTConfig(
        image_size=32,
        channels=4,
        classes=1000,
        patch=4,
        width=64,
        depth=2,
        heads=2,
        learn_sigma=False,
    )
    with pytest.raises(UserError, match=r"incomplete: model.depth, model.heads not set"):
        config(None, patch=4, width=64)


def test_a_misspelt_name_is_answered_with_near_ones() -> None:
    with pytest.raises(UserError, match=r"'sit-xl-2' is not in the zoo; .*SiT-XL/2"):
        family_of("sit-xl-2")
