"""SiT, DiT, REPA and LightningDiT files make models that compute what those programs compute."""

import warnings

import pytest
import torch
from torch import Tensor

from flows.errors import UserError
from flows.models.adaln import told_time
from flows.models.dit import Aligned, DiT, DiTConfig
from flows.paths import path_named
from trainer.checkpoints.foreign import convert, to_foreign

from .references import dit as reference
from .references.parts import State, random_state

TOLERANCE = 1e-5  # of a few hundred float32 operations on numbers of about 1


def sit(*, width: int = 64, outputs: int = 8, side: int = 8, classes: int = 10) -> State:
    shapes = reference.shapes(
        tokens=(side // 2) ** 2,
        width=width,
        patch=2,
        channels=4,
        outputs=outputs,
        classes=classes,
        depth=2,
    )
    return random_state(shapes, seed=31) | {"pos_embed": reference.table(side // 2, width)}


def repa() -> State:
    state = sit(width=32, outputs=4, side=4, classes=5)
    projector = {
        **reference.layer("projectors.0.0", 24, 32),
        **reference.layer("projectors.0.2", 24, 24),
        **reference.layer("projectors.0.4", 12, 24),
    }
    return state | random_state(projector, seed=32)


def lightning() -> State:
    """The tiny configuration of the format: patch 1, 8 channels, 16 tokens, 3 heads of 16."""
    shapes = reference.shapes(
        tokens=16, width=48, patch=1, channels=8, outputs=8, classes=5, depth=2
    )
    for block in ("blocks.0", "blocks.1"):
        for name in ("mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            del shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"]
        shapes |= reference.layer(f"{block}.mlp.w12", 256, 48)
        shapes |= reference.layer(f"{block}.mlp.w3", 48, 128)
        shapes |= reference.layer(f"{block}.adaLN_modulation.1", 192, 48)
        shapes |= {f"{block}.norm{i}.weight": (48,) for i in (1, 2)}
        shapes |= {f"{block}.attn.{part}_norm.weight": (16,) for part in ("q", "k")}
    shapes["final_layer.norm_final.weight"] = (48,)
    state = random_state(shapes, seed=33) | {"pos_embed": reference.table(4, 48)}
    angles = reference.rotations(4, 16).repeat_interleave(2, 1)
    return state | {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}


def built(config: DiTConfig, state: State) -> DiT:
    model = DiT(config)
    model.load_state_dict(state)
    return model


def inputs(config: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (4, config.channels, config.image_size, config.image_size)
    t = torch.tensor([0.05, 0.4, 0.7, 0.95])
    return torch.randn(shape, generator=generator), t, torch.tensor([0, 1, config.classes, 2])


def test_a_sit_file_makes_the_network_it_was_written_from() -> None:
    state = sit()
    config, ours = convert(state, source="sit", heads=4)
    assert config == DiTConfig(
        image_size=8, channels=4, classes=10, patch=2, width=64, depth=2, heads=4, learn_sigma=True
    )
    x, t, label = inputs(config)
    expected = reference.forward(state, x, t, label, heads=4)[0][:, :4]
    torch.testing.assert_close(built(config, ours)(x, t, label), expected, rtol=0, atol=TOLERANCE)


def test_a_dit_file_is_told_diffusion_steps() -> None:
    state = sit()
    config, ours = convert(state, source="dit", heads=4)
    steps = torch.tensor([999.0, 600.0, 250.0, 0.0])
    x, _, label = inputs(config)
    expected = reference.forward(state, x, steps, label, heads=4)[0][:, :4]
    t = 1 - (steps + 1) / 1000
    # The flow time of a late step has lost a bit of the step: 6e-5 of 999, in float32.
    torch.testing.assert_close(built(config, ours)(x, t, label), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(told_time(t, "steps"), steps, rtol=0, atol=1e-4)


def test_diffusion_steps_are_places_on_the_variance_preserving_path() -> None:
    """DiT's linear schedule, beta from 1e-4 to 0.02 in 1,000 steps, and its path here at those times."""
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).sqrt()
    t = 1 - (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    here = path_named("vp").coefficients(t).alpha
    # A product over steps for an exponential of the integral: first order in a step of 1 / 1,000.
    torch.testing.assert_close(kept, here, rtol=0, atol=1.5e-3)


def test_a_repa_file_predicts_noise_minus_data_as_time_runs_to_noise() -> None:
    state = repa()
    config, ours = convert(state, source="repa", heads=2, align_depth=1)
    assert (config.align_width, config.align_hidden, config.learn_sigma) == (12, 24, False)
    x, t, label = inputs(config)
    velocity, projection = reference.forward(state, x, 1 - t, label, heads=2, align_depth=1)
    found = built(config, ours).train()(x, t, label)
    assert isinstance(found, Aligned)
    torch.testing.assert_close(found.prediction, -velocity, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found.projection, projection, rtol=0, atol=TOLERANCE)


def test_a_lightningdit_file_says_its_own_heads() -> None:
    state = lightning()
    config, ours = convert(state, source="lightningdit")
    assert config == DiTConfig(
        image_size=4,
        channels=8,
        classes=5,
        patch=1,
        width=48,
        depth=2,
        heads=3,
        norm="rms",
        norm_affine=True,
        qk_norm=True,
        rope=True,
        feedforward="swiglu",
        wo_shift=True,
    )
    x, t, label = inputs(config)
    expected, _ = reference.forward(state, x, t, label, heads=3)
    torch.testing.assert_close(built(config, ours)(x, t, label), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("source", "state", "facts"),
    [
        ("sit", sit(), {"heads": 4}),
        ("dit", sit(), {"heads": 4}),
        ("repa", repa(), {"heads": 2, "align_depth": 1}),
        ("lightningdit", lightning(), {}),
    ],
    ids=["sit", "dit", "repa", "lightningdit"],
)
def test_there_and_back_no_bit_is_lost(source: str, state: State, facts: dict[str, int]) -> None:
    back = to_foreign(*convert(state, source=source, **facts), source)
    assert back.keys() == state.keys()
    tables = {name for name in state if name.startswith("feat_rope.")}
    for name in state.keys() - tables:
        assert torch.equal(back[name], state[name]), name
    for name in tables:  # computed in float64 here
        torch.testing.assert_close(back[name], state[name], rtol=0, atol=1e-6)


def test_half_precision_stays_what_it_is() -> None:
    state = {name: value.bfloat16() for name, value in sit().items()}
    config, ours = convert(state, source="sit", heads=4)
    back = to_foreign(config, ours, "sit")
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_numbers_that_are_not_real_are_refused_in_weights_and_tables() -> None:
    def kinds(value: Tensor) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of quantized tensors, which torch gives up
            quantized = torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)
        return {
            "qint8": quantized,
            "complex64": value.to(torch.complex64),
            "float4_e2m1fn_x2": torch.zeros(value.shape, dtype=torch.uint8).view(
                torch.float4_e2m1fn_x2
            ),
        }

    for name in ("pos_embed", "x_embedder.proj.bias"):
        for kind, value in kinds(sit()[name]).items():
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with pytest.raises(UserError, match=rf"tensor {name} .* of the kind {kind},"):
                    convert(sit() | {name: value}, source="sit", heads=4)


def test_published_sizes_say_their_heads() -> None:
    with torch.device("meta"):
        model = DiT(DiTConfig(32, 4, 1000, 2, 1152, 28, 16, learn_sigma=True))
    state = to_foreign(model.config, dict(model.state_dict()), "sit")
    state["pos_embed"] = reference.table(16, 1152)
    assert sum(value.numel() for value in state.values()) == 675_129_632
    config, _ = convert(state, source="sit")
    assert config == model.config


@pytest.mark.parametrize(
    ("change", "facts", "sentence"),
    [
        (lambda s: s, {}, r"model\.heads does not follow .* give model\.heads=\.\.\."),
        (lambda s: s, {"heads": 4, "width": 32}, r"model\.width = 32 was told, .* say 64; drop it"),
        (lambda s: s, {"heads": "many"}, r"model\.heads = 'many': .*integer"),
        (lambda s: s, {"heads": 4, "colour": 1}, r"model\.colour is no key of a model"),
        (lambda s: s, {"heads": 5}, r"model\.width = 64 is not divisible by model\.heads = 5"),
        (
            lambda s: {n: v for n, v in s.items() if n != "blocks.1.attn.proj.bias"},
            {"heads": 4},
            r"tensor blocks\.1\.attn\.proj\.bias is missing",
        ),
        (
            lambda s: s | {"blocks.0.attn.extra": torch.ones(1)},
            {"heads": 4},
            r"tensor blocks\.0\.attn\.extra has no place in sit files",
        ),
        (
            lambda s: s | {"blocks.1.attn.proj.bias": torch.ones(3)},
            {"heads": 4},
            r"tensor blocks\.1\.attn\.proj\.bias is \[3\], and .* it is \[64\]",
        ),
        (
            lambda s: s | {"pos_embed": torch.ones(1, 16, 64)},
            {"heads": 4},
            r"tensor pos_embed is not the table",
        ),
        (
            lambda s: s | {"pos_embed": torch.ones(1, 15, 64)},
            {"heads": 4},
            r"tensor pos_embed has 15 tokens, and no square has",
        ),
        (
            lambda s: {n: v for n, v in s.items() if n != "pos_embed"},
            {"heads": 4},
            r"data\.image_size does not follow .* give data\.image_size=\.\.\.",
        ),
        (lambda s: {"weight": torch.ones(1)}, {}, r"no tensor x_embedder\.proj\.weight.*weight"),
        (lambda s: {}, {}, r"no tensor x_embedder\.proj\.weight.*none are there"),
        (
            lambda s: s | {"x_embedder.proj.weight": torch.ones(64, 16)},
            {},
            r"tensor x_embedder\.proj\.weight is \[64, 16\], and sit has 4 dimensions",
        ),
        (lambda s: s | {"epoch": 3}, {"heads": 4}, r"epoch \(int\) is no tensor"),
        (
            lambda s: s | {"y_embedder.embedding_table.weight": torch.ones(1, 64)},
            {"heads": 4},
            r"y_embedder\.embedding_table\.weight has 1 row, .* that of no class",
        ),
    ],
)
def test_what_a_sit_file_may_not_be_is_said(change, facts, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        convert(change(sit()), source="sit", **facts)


def test_the_image_size_may_be_told_where_the_table_is_left_out() -> None:
    state = {name: value for name, value in sit().items() if name != "pos_embed"}
    assert convert(state, source="sit", heads=4, image_size=8).config.image_size == 8


def test_a_repa_file_must_say_where_it_is_aligned() -> None:
    with pytest.raises(UserError, match=r"model\.align_depth .* \(8 in the published models\)"):
        convert(repa(), source="repa", heads=2)
    several = repa() | {"projectors.1.0.weight": torch.ones(24, 32)}
    with pytest.raises(UserError, match="several projectors"):
        convert(several, source="repa", heads=2, align_depth=1)


def test_a_lightningdit_with_layer_norms_of_queries_is_refused() -> None:
    state = lightning() | {"blocks.0.attn.q_norm.bias": torch.zeros(16)}
    with pytest.raises(UserError, match="RMS norm"):
        convert(state, source="lightningdit")


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    cosines, norm = "feat_rope.freqs_cos", "blocks.0.attn.q_norm.weight"
    for width in (20, 96):
        with pytest.raises(UserError, match=rf"tensor feat_rope\.freqs_cos .* heads of {width}"):
            convert(lightning() | {cosines: torch.ones(16, width)}, source="lightningdit")
        plain = {n: v for n, v in lightning().items() if not n.startswith("feat_rope.")}
        with pytest.raises(UserError, match=rf"q_norm\.weight is that of heads of {width}"):
            convert(plain | {norm: torch.ones(width)}, source="lightningdit")


@pytest.mark.parametrize(
    ("changes", "target", "sentence"),
    [
        ({"rope": True}, "sit", r"model\.rope = True has no place in a sit file"),
        ({"norm_placement": "peri"}, "sit", r"model\.norm_placement = peri has no place"),
        ({"time": "steps"}, "sit", r"model\.time = steps has no place in a sit file"),
        ({}, "dit", r"model\.time = flow has no place in a dit file"),
        ({"norm": "dyt"}, "lightningdit", r"model\.norm = dyt"),
        ({"time": "reversed"}, "repa", r"model\.align_depth = 0"),
        ({"qk_norm": True}, "repa", r"model\.qk_norm = True has no place in a repa file"),
        (
            {"align_depth": 1, "align_width": 3},
            "lightningdit",
            r"model\.align_depth = 1 has no place",
        ),
        ({}, "jet", r"jet files hold models of the family jet, .* of the family dit;"),
        ({}, "png", r"there is no format 'png'; use .*sit"),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_not_exported(changes, target, sentence) -> None:
    config = DiTConfig(8, 4, 10, 2, 64, 2, 4, **changes)
    with torch.device("meta"):
        state = dict(DiT(config).state_dict())
    with pytest.raises(UserError, match=sentence):
        to_foreign(config, state, target)


def test_an_incomplete_state_is_not_exported() -> None:
    config, ours = convert(sit(), source="sit", heads=4)
    short = ours | {"blocks.0.attention.qkv.weight": torch.ones(3, 64)}
    with pytest.raises(UserError, match=r"qkv\.weight is \[3, 64\] .* it is \[192, 64\]"):
        to_foreign(config, short, "sit")
    with pytest.raises(UserError, match=r"tensor patches\.weight is \[4\] in the state"):
        to_foreign(config, ours | {"patches.weight": torch.ones(4)}, "sit")
    del ours["patches.bias"]
    with pytest.raises(UserError, match=r"tensor patches\.bias is missing"):
        to_foreign(config, ours, "sit")
