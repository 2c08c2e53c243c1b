"""A model's chain is its forward: same results, same gradients, every parameter in one place."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Initialisable, initialise
from flows.models.chain import Chained
from flows.models.dit import DiT, DiTConfig
from flows.models.mmdit import MMDiT
from flows.models.mmdit_config import MMDiTConfig
from flows.models.starflow import STARFlow, STARFlowConfig
from flows.models.tarflow import TarFlow, TarFlowConfig

DIT = {
    "image_size": 8,
    "channels": 2,
    "classes": 3,
    "patch": 2,
    "width": 16,
    "depth": 2,
    "heads": 2,
}
TEXT = {
    "image_size": 8, "channels": 2, "classes": 3, "text_width": 8, "text_tokens": 4, "patch": 2, "width": 16,
    "double_depth": 2, "single_depth": 1, "heads": 2, "pool_text": True,
}  # fmt: skip
FLOW = {"image_size": 4, "channels": 1, "classes": 3, "patch": 2, "width": 16, "head_width": 16}


def models() -> dict[str, nn.Module]:
    starflow = STARFlowConfig(**{**FLOW, "width": 32, "head_width": 32}, layers=(1, 3))  # type: ignore[arg-type]
    return {
        "dit": DiT(DiTConfig(**DIT, learn_sigma=True)),  # type: ignore[arg-type]
        "rotary": DiT(DiTConfig(**DIT, learn_sigma=False, rope=True, norm_placement="peri")),  # type: ignore[arg-type]
        "mmdit": MMDiT(MMDiTConfig(**TEXT)),  # type: ignore[arg-type]
        "words alone": MMDiT(MMDiTConfig(**TEXT | {"single_depth": 0, "mask_text": True})),  # type: ignore[arg-type]
        "starflow": STARFlow(starflow),
        "tarflow": TarFlow(TarFlowConfig(**FLOW, flow_blocks=2, layers=2)),  # type: ignore[arg-type]
    }


def inputs(model: nn.Module) -> dict[str, Tensor]:
    config = cast(Any, model).config
    generator = torch.Generator().manual_seed(3)
    size = (4, config.channels, config.image_size, config.image_size)
    found = {"x": torch.randn(size, generator=generator), "label": torch.tensor([0, 1, 2, 3])}
    if isinstance(model, DiT | MMDiT):
        found["t"] = torch.rand(4, generator=generator)
    if isinstance(model, MMDiT):
        found["text"] = torch.randn(4, config.text_tokens, config.text_width, generator=generator)
        found["text"][0, 2:] = 0.0  # padding
    return found


def leaves(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


@pytest.mark.parametrize("name", list(models()))
def test_the_chain_is_the_forward(name: str) -> None:
    model = models()[name]
    initialise(cast(Initialisable, model), 1)
    with torch.no_grad():  # so that modulations and last layers do something
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    given = inputs(model)
    rest = {key: value for key, value in given.items() if key != "x"}
    found = []
    for output in (model(**given), cast(Chained, model).chain().run(given["x"], rest)):
        model.zero_grad()
        sum(leaf.square().sum() for leaf in leaves(output)).backward()  # type: ignore[union-attr]
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([leaf.detach() for leaf in leaves(output)] + gradients)
    assert len(found[0]) > 10
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", list(models()))
def test_every_parameter_belongs_to_one_link_or_to_what_is_told(name: str) -> None:
    model = models()[name]
    chain = cast(Chained, model).chain()
    for parameter, _ in model.named_parameters():
        owners = [link.name for link in chain.links if parameter.startswith(link.holds)]
        owners += ["told"] if parameter.startswith(chain.tells or ("nothing",)) else []
        assert len(owners) == 1, (parameter, owners)


def test_hidden_states_from_the_middle_are_refused() -> None:
    config = DiTConfig(**DIT, learn_sigma=False, align_depth=1, align_width=8, align_hidden=8)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"model\.align_depth = 1"):
        DiT(config).chain()
