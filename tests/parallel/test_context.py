"""A network whose sequences are cut over ranks is the network of one device, gradients included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.dequantisation import Levels
from flows.errors import UserError
from flows.initialise import initialise
from flows.models.dequantised import Dequantised, DequantiserConfig
from flows.models.dit import DiT, DiTConfig
from flows.models.jet import Jet, JetConfig
from flows.models.mmdit import MMDiT
from flows.models.mmdit_config import MMDiTConfig
from flows.models.starflow import STARFlow, STARFlowConfig
from flows.models.tarflow import TarFlow, TarFlowConfig
from flows.models.token_dit import TokenDiT, TokenDiTConfig
from parallel.context import check_context, cut_sequences
from parallel.mesh import Context
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks

# Relative L2: sums of float32 numbers in another order, through two layers.
EXACT = 2e-6
BATCH = 2

IMAGE: dict[str, Any] = {"image_size": 8, "channels": 1, "classes": 3}


def dit(**options: Any) -> nn.Module:
    return DiT(DiTConfig(**IMAGE, patch=2, width=32, depth=2, heads=4, **options))


def mmdit(**options: Any) -> nn.Module:
    sizes: dict[str, Any] = {"text_width": 5, "text_tokens": 8, "patch": 2, "width": 32, "heads": 4}
    return MMDiT(MMDiTConfig(**IMAGE, **sizes, double_depth=2, single_depth=1, **options))


def tarflow() -> nn.Module:
    """Its chain has 15 places."""
    return TarFlow(TarFlowConfig(**IMAGE, patch=2, width=32, flow_blocks=2, layers=2, head_width=8))


def starflow() -> nn.Module:
    """Its chain has 16 places, and the upper one 3 words before them; query heads share keys."""
    return STARFlow(
        STARFlowConfig(
            **IMAGE, patch=2, width=96, layers=(1, 2), head_width=24, text_width=5, text_tokens=3,
            kv_heads=2,
        )
    )  # fmt: skip


def jet() -> nn.Module:
    return Jet(
        JetConfig(**IMAGE, patch=2, width=32, couplings=5, layers=1, heads=4, conditional=True)
    )


def dequantised_jet() -> nn.Module:
    config = DequantiserConfig(
        image_size=8, channels=1, levels=Levels(256, "above"), patch=2, width=16, couplings=2,
        layers=1, heads=4,
    )  # fmt: skip
    return Dequantised(jet(), config)


def tokens() -> nn.Module:
    return TokenDiT(
        TokenDiTConfig(**IMAGE | {"image_size": 4}, width=32, depth=2, heads=4, levels=3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dit": dit,
    "dit, all options": lambda: dit(
        rope=True, qk_norm=True, norm="rms", feedforward="swiglu", align_depth=1, align_width=6
    ),
    "dit, aligned at its end": lambda: dit(align_depth=2, align_width=6),
    "mmdit": mmdit,
    "mmdit, unmasked": lambda: mmdit(mask_text=False, rope=False, qk_norm=False),
    "tarflow": tarflow,
    "starflow": starflow,
    "jet": jet,
    "dequantised jet": dequantised_jet,
    "token_dit": tokens,
}


def random_model(name: str) -> nn.Module:
    """With weights that are all at work: fresh networks have zeros where they end."""
    model: Any = MODELS[name]()
    initialise(model, 5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """What the model of that name takes."""
    generator = torch.Generator().manual_seed(7)
    image = torch.rand(BATCH, 1, 8, 8, generator=generator)
    label, t = torch.tensor([1, 3]), torch.tensor([0.3, 0.8])
    text = torch.randn(BATCH, 8 if name.startswith("mmdit") else 3, 5, generator=generator)
    text[0, 2:] = 0.0
    if name.startswith("mmdit"):
        return {"x": image, "t": t, "text": text}
    if name.startswith("dit"):
        return {"x": image, "t": t, "label": label}
    if name == "token_dit":
        drawn = torch.randint(4, (BATCH, 16), generator=generator)
        return {"x": drawn, "t": t, "label": label}
    if name == "starflow":
        return {"x": image, "text": text}
    if name == "dequantised jet":
        levels = torch.randint(256, image.shape, generator=generator) / 256
        noise = torch.randn(image.shape, generator=generator)
        return {"x": levels, "noise": noise, "label": label}
    return {"x": image, "label": label}


def run(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Outputs and gradients of weights of a loss that all outputs count in."""
    outputs = model(**inputs(name))
    listed = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(8)
    loss = sum((torch.randn(out.shape, generator=generator) * out).sum() for out in listed)
    model.zero_grad()
    loss.backward()
    found = {f"output {place}": out.detach() for place, out in enumerate(listed)}
    weights = model.named_parameters()
    return found | {key: weight.grad for key, weight in weights if weight.grad is not None}


def errors_of(name: str, way: Context, expected: dict[str, Tensor]) -> float:
    """The worst of outputs and gradients."""
    model: Any = random_model(name)
    cut_sequences(model, model.regions(), dist.group.WORLD, way)
    found = run(model, name)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        if not key.startswith("output"):
            dist.all_reduce(value)
            value /= dist.get_world_size()
    # A gradient that is rounding noise, as of biases of keys, has no relative error.
    scale = max(float(value.norm()) for key, value in expected.items() if "output" not in key)
    return max(
        float((found[key] - value).norm() / max(float(value.norm()), 1e-3 * scale))
        for key, value in expected.items()
    )


def every_model(_ranks: Ranks, cells: dict[str, list[Context]]) -> dict[str, float]:
    errors = {}
    for name, ways in cells.items():
        expected = run(random_model(name), name)
        errors |= {f"{name}, {way}": errors_of(name, way, expected) for way in ways}
    return errors


@pytest.fixture(scope="module")
def errors() -> dict[int, list[dict[str, float]]]:
    """Ranks -> of each rank, the worst error by model and way."""
    cells: dict[int, dict[str, list[Context]]] = {
        2: {name: ["ulysses", "ring"] for name in MODELS},
        4: {"mmdit": ["ulysses"], "tarflow": ["ulysses", "ring"], "starflow": ["ring"]},
    }
    return {size: run_ranks(every_model, size, cells=cells[size]) for size in cells}


@pytest.mark.parametrize("size", [2, 4])
def test_cut_sequences_give_the_outputs_and_gradients_of_whole_ones(errors, size):
    for found in errors[size]:
        assert len(found) >= 4
        assert not {name: error for name, error in found.items() if not error <= EXACT}


@pytest.mark.parametrize(
    ("name", "cp", "way", "tp", "says"),
    [
        ("dit", 3, "ring", 1, r"cp = 3 .*\(data.image_size / model.patch\)\^2 = 16 tokens; use 1, 2, 4"),
        ("mmdit", 16, "ring", 1, "data.text.tokens = 8 tokens; use 1, 2, 4 or 8"),
        ("dit", 8, "ulysses", 1, "parallel.cp = 8 does not divide model.heads = 4.*parallel.context=ring"),
        ("tarflow", 3, "ulysses", 1, "does not divide model.width / model.head_width = 4"),
        ("jet", 4, "ulysses", 2, "parallel.tp x cp = 2 x 4 does not divide model.heads = 4"),
        ("starflow", 4, "ulysses", 1, "model.kv_heads = 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused(name, cp, way, tp, says):
    with torch.device("meta"):
        model: Any = MODELS[name]()
    with pytest.raises(UserError, match=says):
        check_context(model, cp, way, tp)


def test_chains_of_any_length_are_cut():
    with torch.device("meta"):
        models: list[Any] = [MODELS[name]() for name in ("tarflow", "starflow")]
    for model in models:
        check_context(model, 7, "ring", 1)
