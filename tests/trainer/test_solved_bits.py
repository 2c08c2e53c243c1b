"""Bits of a flow-matching model by its differential equation, of images and of latents."""

import math

import pytest
import torch
from torch import Tensor, nn

from flows.errors import UserError
from flows.paths import path_named
from tests.flows.test_likelihood import gaussian_velocity
from trainer.bits import LEVELS, check_solved, solved_bits
from trainer.recipe import load_recipe

MEAN, STD = 0.2, 0.3


class Gaussian(nn.Module):
    """The exact velocity of N(MEAN, STD^2) where the class is even, and of twice the STD elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        std = STD * torch.where(label % 2 == 0, 1.0, self.odd).view(-1, 1, 1, 1)
        return gaussian_velocity(path_named("linear"), MEAN, std)(x, t)


def data_of(labels: Tensor) -> Tensor:
    normal = torch.randn(len(labels), 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return MEAN + STD * (1 + labels % 2).view(-1, 1, 1, 1) * normal


def own_bits(x: Tensor, labels: Tensor) -> float:
    std = (STD * (1 + labels % 2)).view(-1, 1, 1, 1)
    nats = 0.5 * ((x - MEAN) / std).square() + std.log() + 0.5 * math.log(2 * math.pi)
    return nats.mean().item() / math.log(2)


def silent(_done: int, _of: int) -> None:
    pass


def test_bits_of_latents_are_those_of_their_density() -> None:
    labels = torch.arange(100) % 10
    x = data_of(labels)
    found = solved_bits(Gaussian(), load_recipe("sit_emoji", []), x[40:], (x, labels), 40, silent)
    assert found.model == pytest.approx(own_bits(x[:40], labels[:40]), abs=1e-4)
    assert (found.count, found.what, found.noise, found.least) == (40, "latents", 0.0, None)


def test_bits_of_images_count_their_levels() -> None:
    labels = torch.arange(400) % 10
    x = (
        (data_of(labels) + 1) * 127.5
    ).round() / 127.5 - 1  # on the levels, also of those beyond the last
    found = solved_bits(Gaussian(), load_recipe("digits8", []), x[200:], (x, labels), 100, silent)
    bins = own_bits(x[:100], labels[:100]) - math.log2(LEVELS.width)
    assert found.model == pytest.approx(bins, abs=5e-4)
    assert found.error > 0
    assert found.what == "images"


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("tarflow_bits", "model.family = tarflow has a likelihood of its own"),
        ("tokens_digits8", "this model has none"),
        ("mmdit_emoji", "this one reads captions"),
    ],
)
def test_models_without_such_an_equation_are_refused(recipe: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_solved(load_recipe(recipe, []))
