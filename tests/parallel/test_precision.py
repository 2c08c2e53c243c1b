"""Products in float8 are refused by name where they cannot be; what they may be is known anywhere."""

import pytest
import torch
from torch import nn

from flows.errors import UserError
from flows.models.attention import QueryKeyValue
from parallel.precision import check_float8, in_float8, multiply_in_float8
from tests.trainer import families
from trainer.assembly import plan
from trainer.recipe import override_recipe

ON = ["train.float8=true", "train.precision=bf16"]


def test_a_cpu_is_refused_by_name():
    with pytest.raises(
        UserError, match=r"train\.float8 = true needs a device .* this is a CPU; use"
    ):
        check_float8(torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks a machine without a device")
def test_a_recipe_is_refused_before_any_rank(tmp_path):
    with pytest.raises(UserError, match=r"train\.float8 = true needs a device"):
        plan(override_recipe(families.recipe("dit", tmp_path), ON), 1)


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_layers_that_ranks_share_are_refused(tmp_path, axis):
    recipe = override_recipe(families.recipe("dit", tmp_path), [*ON, f"parallel.{axis}=2"])
    with pytest.raises(UserError, match=rf"train\.float8 = true and parallel\.{axis} = 2"):
        plan(recipe, 2)


def test_float32_beside_float8_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"train\.precision = fp32; set train\.precision=bf16"):
        override_recipe(families.recipe("dit", tmp_path), ON[:1])


def test_plain_layers_of_sides_that_kernels_take():
    assert in_float8(nn.Linear(32, 48))
    assert not in_float8(nn.Linear(32, 40))
    assert not in_float8(QueryKeyValue(32))
    assert not in_float8(nn.LayerNorm(32))


@pytest.mark.gpu
def test_products_in_float8_are_near_those_in_bfloat16():
    pytest.importorskip("torchao")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        check_float8(device)
    except UserError as error:
        pytest.skip(str(error))
    block = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)).to(device)
    x = torch.randn(32, 64, device=device)
    with torch.autocast("cuda", torch.bfloat16):
        wanted = block(x)
        multiply_in_float8([block])
        found = block(x)
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    found.float().sum().backward()
