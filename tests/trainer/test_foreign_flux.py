"""FLUX files make networks that compute what FLUX computes."""

import pytest
import torch

from flows.errors import UserError
from flows.models.mmdit import MMDiT
from flows.models.mmdit_config import MMDiTConfig
from flows.models.mmdit_sizes import PUBLISHED
from trainer.checkpoints.foreign import convert, to_foreign

from .references import flux as reference
from .references.parts import State, random_state

FACTS = {"image_size": 8, "text_tokens": 5}
AXES = (4, 10, 10)


def flux(*, guidance: bool = False) -> State:
    """width 48, 2 heads, 16 features, text 20, vector 12, 2 double and 2 single blocks"""
    shapes = reference.shapes(
        width=48, head=24, features=16, context=20, vector=12, guidance=guidance
    )
    return random_state(shapes, seed=51)


def inputs():
    generator = torch.Generator().manual_seed(6)
    x, text, vector = (
        torch.randn(3, *shape, generator=generator) for shape in ((4, 8, 8), (5, 20), (12,))
    )
    return x, torch.tensor([0.03, 0.5, 0.9]), text, vector


@pytest.mark.parametrize("guidance", [False, True])
def test_a_flux_file_makes_the_network_it_was_written_from(guidance: bool) -> None:
    state = flux(guidance=guidance)
    config, ours = convert(state, source="flux", **FACTS)
    assert config == MMDiTConfig(
        image_size=8,
        channels=4,
        classes=1,
        text_width=20,
        text_tokens=5,
        patch=2,
        width=48,
        heads=2,
        double_depth=2,
        single_depth=2,
        mask_text=False,
        vector_width=12,
        guidance=3.5 if guidance else 0.0,
        time="reversed",
    )
    model = MMDiT(config)
    model.load_state_dict(ours)
    x, t, text, vector = inputs()
    strength = torch.tensor([3.5, 1.0, 5.0]) if guidance else None
    found = model(x, t, text=text, vector=vector, guidance=strength)
    packed = reference.forward(
        state, reference.pack(x), 1 - t, text, vector, strength, heads=2, axes=AXES
    )
    # Angles of 1000 t times frequencies near 1 have 6e-5 of rounding, in float32, on either side.
    torch.testing.assert_close(found, -reference.unpack(packed, 8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [False, True])
def test_there_and_back_no_bit_is_lost(guidance: bool) -> None:
    state = flux(guidance=guidance)
    back = to_foreign(*convert(state, source="flux", **FACTS), "flux")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_the_names_of_black_forest_labs_mean_the_same() -> None:
    state = flux()
    theirs = {name.replace("_norm.weight", "_norm.scale"): value for name, value in state.items()}
    assert theirs.keys() != state.keys()
    _, ours = convert(state, source="flux", **FACTS)
    _, same = convert(theirs, source="flux", **FACTS)
    assert ours.keys() == same.keys()
    assert all(torch.equal(ours[name], same[name]) for name in ours)


def test_the_published_size_is_recognised() -> None:
    config = MMDiTConfig(
        image_size=128,
        channels=16,
        classes=1,
        text_width=4096,
        text_tokens=512,
        **PUBLISHED["FLUX"],
    )
    with torch.device("meta"):
        state = to_foreign(config, dict(MMDiT(config).state_dict()), "flux")
    assert sum(value.numel() for value in state.values()) == 11_891_178_560
    again, _ = convert(state, source="flux", image_size=128, text_tokens=512)
    assert again == config


@pytest.mark.parametrize(
    ("change", "facts", "sentence"),
    [
        ({}, {}, r"data\.image_size does not follow .* \(128 for images of 1024 pixels\)"),
        ({}, {"image_size": 8}, r"data\.text\.tokens does not follow .* \(512 for FLUX\.1-dev"),
        ({}, FACTS | {"time": "flow"}, r"model\.time = flow was told, .* say reversed"),
        ({"extra": torch.ones(1)}, FACTS, "tensor extra has no place in flux files"),
        (
            {"double_blocks.0.img_attn.norm.query_norm.weight": torch.ones(96)},
            FACTS,
            r"query_norm\.weight is that of heads of 96, and the model's width of 48",
        ),
        ({}, FACTS | {"patch": 3, "image_size": 9}, r"img_in\.weight is \[48, 16\]"),
    ],
)
def test_what_a_file_may_not_be_is_said(change, facts, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        convert(flux() | change, source="flux", **facts)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask_text": True}, r"model\.mask_text = True has no place"),
        ({"time": "flow"}, r"model\.time = flow has no place in a flux file"),
        ({"single_depth": 0}, r"model\.single_depth = 0, and every model"),
        ({"vector_width": 0}, r"model\.vector_width = 0, and every model"),
    ],
)
def test_a_model_that_flux_cannot_hold_is_not_exported(changes, sentence) -> None:
    keys = {"mask_text": False, "time": "reversed", "single_depth": 1, "vector_width": 12} | changes
    config = MMDiTConfig(8, 4, 1, 20, 5, 2, 48, 2, 1, **keys)
    with pytest.raises(UserError, match=sentence):
        to_foreign(config, {}, "flux")
