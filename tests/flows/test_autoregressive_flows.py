"""TarFlow and STARFlow are invertible, count volume exactly, and are the published networks."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flows.errors import UserError
from flows.initialise import initialise
from flows.models import starflow, tarflow
from flows.models.autoregressive import SOFTPLUS_ONE, FlowBlock
from flows.models.family import Family, architecture, parameter_count
from flows.models.starflow import STARFlow, STARFlowConfig
from flows.models.tarflow import TarFlow, TarFlowConfig, forward_flops
from flows.samplers.inversion import invert, prior

TARFLOW = TarFlowConfig(
    image_size=8, channels=3, classes=5, patch=2, width=32, flow_blocks=3, layers=2, head_width=8
)
STARFLOW = STARFlowConfig(
    image_size=4,
    channels=4,
    classes=0,
    patch=1,
    width=48,
    layers=(1, 1, 2),
    text_width=10,
    text_tokens=6,
    head_width=24,
)
RICH = STARFlowConfig(
    image_size=8,
    channels=3,
    classes=5,
    patch=2,
    width=96,
    layers=(1, 2),
    head_width=24,
    kv_heads=2,
    bias=False,
    qk_norm=True,
    gated=True,
    norm="rms",
    placement="peri",
    clip=3.0,
    conditioned="all",
)
CONFIGS = {
    "tarflow": TARFLOW,
    "tarflow, volume preserving": replace(TARFLOW, volume_preserving=True),
    "tarflow, unconditional": replace(TARFLOW, conditional=False),
    "tarflow, peri-norm": replace(TARFLOW, placement="peri"),
    "tarflow, post-norm, dynamic tanh": replace(TARFLOW, placement="post", norm="dyt"),
    "starflow with text": STARFLOW,
    "starflow with classes and all options": RICH,
    "starflow, learned positions": replace(RICH, position="learned", qk_norm=False, order="r2l"),
    "starflow, exponential scale": replace(STARFLOW, start_token=False, scale="exp", clip=0.0),
    "starflow, unconditional": replace(STARFLOW, text_tokens=0),
}  # fmt: skip


def fresh(config: TarFlowConfig | STARFlowConfig) -> TarFlow | STARFlow:
    model = TarFlow(config) if isinstance(config, TarFlowConfig) else STARFlow(config)
    initialise(model, seed=0)
    return model


def disturbed(config: TarFlowConfig | STARFlowConfig) -> TarFlow | STARFlow:
    """A flow in which every weight matters, with moderate scales."""
    model = fresh(config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        weight.data += torch.empty_like(weight).normal_(0.0, 0.05, generator=generator)
        if "project_out" in name:
            weight.data *= 0.5
    return model


def inputs(config: TarFlowConfig | STARFlowConfig, batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    side = config.image_size
    given = {"x": torch.randn(batch, config.channels, side, side, generator=generator)}
    given["label"] = torch.randint(0, config.classes + 1, (batch,), generator=generator)
    if isinstance(config, STARFlowConfig) and config.text_tokens:
        shape = (batch, config.text_tokens, config.text_width)
        given["text"] = torch.randn(shape, generator=generator)
    return given


def blocks_of(model: TarFlow | STARFlow) -> list[FlowBlock]:
    return list(model.flow_blocks)


def read_at_once(block, v, condition):
    """(log scale, shift) that a block says of the whole chain, without a cache."""
    h = block.embed(v, condition)
    for layer in block.layers:
        h = block.layer(layer, h)
    return block._read(h[:, block.shape.prefix_tokens :])


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def config(request: pytest.FixtureRequest) -> TarFlowConfig | STARFlowConfig:
    return CONFIGS[request.param]


def test_the_log_determinant_is_that_of_the_jacobian(config) -> None:
    model = disturbed(config).double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in inputs(config, 1).items()}
    x = given.pop("x")

    def flat(pixels: Tensor) -> Tensor:
        return model(pixels.view_as(x), **given).z.flatten()

    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    # The flow's ends are float32 even in a float64 model.
    expected = torch.linalg.slogdet(jacobian.double()).logabsdet
    found = model(x, **given).logdet
    assert abs(found.item() - expected.item()) < 1e-5 * x.numel()
    preserving = getattr(config, "volume_preserving", False)
    assert (found.item() == 0.0) if preserving else abs(found.item()) > 1e-3


def test_a_block_looks_back_in_its_own_order_alone(config) -> None:
    model = disturbed(config)
    given = inputs(config, 1)
    condition = model.condition(given.get("label"), given.get("text"), 1, torch.device("cpu"))
    u = model.tokens(given["x"])
    for block in blocks_of(model):
        jacobian = torch.autograd.functional.jacobian(lambda v, b=block: b(v, condition)[0], u)
        seen = jacobian[0, :, :, 0].abs().amax(dim=(1, 3))
        if block.shape.reverse:
            seen = seen.flip(0, 1)
        assert seen.triu(1).max() == 0
        assert seen.tril(-1).max() > 0
        # A token depends on itself by its scale, feature by feature.
        own = jacobian[0, :, :, 0].diagonal(dim1=0, dim2=2)
        assert (own.diagonal(dim1=0, dim2=1) > 0).all()
        assert own.permute(2, 0, 1).tril(-1).abs().max() == 0


def test_without_a_start_token_the_first_token_of_the_chain_is_unchanged() -> None:
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    u = model.tokens(given["x"])
    forwards, backwards = (block(u, given["label"])[0] for block in blocks_of(model)[:2])
    assert torch.equal(forwards[:, 0], u[:, 0])
    assert not torch.equal(forwards[:, -1], u[:, -1])
    assert torch.equal(backwards[:, -1], u[:, -1])
    changed = blocks_of(disturbed(STARFLOW))[0]
    u = torch.randn(2, 16, 4)
    assert ((changed(u, None)[0] - u).abs().amax(dim=2) > 1e-4).all()


def test_a_fresh_flow_is_the_identity(config) -> None:
    model, given = fresh(config), inputs(config)
    output = model(**given)
    torch.testing.assert_close(output.z, model.tokens(given["x"]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(output.logdet, torch.zeros(3), atol=1e-4, rtol=0)


def test_with_a_bias_in_the_last_layer_alone_the_flow_is_a_constant_affine_map() -> None:
    """Published flows start there: their last bias is not zero, though their last weight is."""
    model, given = fresh(TARFLOW), inputs(TARFLOW)
    for block in blocks_of(model):
        torch.nn.init.constant_(block.project_out.bias, 0.1)
    moved = model(**given)
    other = model(given["x"] + 1.0, given["label"])
    assert abs(moved.logdet[0].item()) > 0.1
    torch.testing.assert_close(moved.logdet, other.logdet)


def test_power_is_the_mean_square_of_input_and_intermediate_outputs() -> None:
    model, given = disturbed(STARFLOW), inputs(STARFLOW)
    u = model.tokens(given["x"])
    expected = u.square().mean((1, 2))
    condition = model.condition(None, given["text"], 3, u.device)
    for block in blocks_of(model)[:-1]:
        u, _ = block(u, condition)
        expected = expected + u.square().mean((1, 2))
    torch.testing.assert_close(model(**given).power, expected)


def test_it_is_finite_under_bfloat16_and_its_ends_stay_float32(config) -> None:
    model, given = disturbed(config), inputs(config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**given)
    assert all(part.dtype == torch.float32 for part in output)
    assert all(part.isfinite().all() for part in output)
    torch.testing.assert_close(output.z, model(**given).z, atol=0.1, rtol=0.1)
    output.z.square().mean().backward()
    assert all(
        weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None
    )


def test_no_label_is_the_mean_of_all_class_vectors() -> None:
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    none = model(given["x"])
    assert torch.equal(none.z, model(given["x"], torch.full((3,), 5)).z)
    averaged = copy.deepcopy(model)
    for block in blocks_of(averaged):
        block.label.data[:] = block.label.data.mean(0)
    torch.testing.assert_close(none.z, averaged(given["x"], torch.zeros(3, dtype=torch.int64)).z)


def test_text_reaches_the_top_block_alone_unless_all_are_told() -> None:
    for conditioned in ("top", "all"):
        model = disturbed(replace(STARFLOW, conditioned=conditioned))
        given = inputs(STARFLOW)
        u = model.tokens(given["x"])
        first, other = (given["text"], given["text"].flip(0))
        for block in blocks_of(model)[:-1]:
            same = torch.equal(block(u, first)[0], block(u, other)[0])
            assert same == (conditioned == "top")
        top = blocks_of(model)[-1]
        assert not torch.equal(top(u, first)[0], top(u, other)[0])


def test_scale_is_one_at_zero_and_outputs_stay_within_the_soft_clip() -> None:
    model = disturbed(replace(STARFLOW, clip=2.0))
    block = blocks_of(model)[0]
    bound = math.log(math.log1p(math.exp(2.0 + SOFTPLUS_ONE)))
    with torch.no_grad():
        log_scale, shift = block._read(torch.zeros(1, 1, 48))
        block.project_out.weight.zero_(), block.project_out.bias.zero_()
        ones, zeros = block._read(torch.randn(2, 5, 48))
        block.project_out.weight.normal_(0.0, 100.0)
        wild, far = block._read(torch.randn(2, 50, 48))
    torch.testing.assert_close(ones, torch.zeros_like(ones), atol=1e-6, rtol=0)
    assert log_scale.shape == shift.shape == (1, 1, 4)
    assert zeros.abs().max() == 0
    assert far.abs().max() <= 2.0
    assert far.abs().max() > 1.99
    assert wild.max() <= bound + 1e-6


def test_without_a_soft_clip_a_stray_token_has_no_bound_and_with_one_it_has() -> None:
    """The log-scale of a published TarFlow grows with tokens that are unlike any in the data."""
    label = torch.arange(4)
    noise = prior(TarFlow(TARFLOW), 0, label)
    broken = {}
    for clip in (0.0, 4.0):
        model = disturbed(replace(TARFLOW, clip=clip))
        for block in blocks_of(model):
            block.project_out.weight.data.mul_(3.0)
        found = invert(model, 30 * noise, label).x
        broken[clip] = bool((~torch.isfinite(found)).any())
        if clip:
            # |u| <= e^c |w| + c in each of the blocks
            bound = 30 * noise.abs().max()
            for _ in blocks_of(model):
                bound = math.exp(clip) * bound + clip
            assert found.abs().max() <= bound
    assert broken == {0.0: True, 4.0: False}


def attention_by_hand(h: Tensor, qkv: nn.Linear, head: int, sizes: list[int]) -> Tensor:
    q, k, v = (
        part.unflatten(-1, (-1, head)).transpose(1, 2)
        for part in F.linear(h, qkv.weight, qkv.bias).split([head * n for n in sizes], dim=-1)
    )
    scores = (q / head**0.25) @ (k / head**0.25).transpose(-1, -2)
    scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_tarflow_is_the_published_network() -> None:
    """Written plainly from the paper's text, with positions permuted together with tokens."""
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    u = F.unfold(given["x"], 2, stride=2).transpose(1, 2)
    logdet = torch.zeros(3)
    for k, block in enumerate(blocks_of(model)):
        order = torch.arange(16) if k % 2 == 0 else torch.arange(16).flip(0)
        raster = block.position if k % 2 == 0 else block.position.flip(0)
        u = u[:, order]
        h = block.project_in(u) + raster[order]
        null = block.label.mean(0, keepdim=True)
        h = h + torch.cat((block.label, null))[given["label"]][:, None]
        for layer in block.layers:
            inner = layer.attention.inner
            y = F.layer_norm(h, (32,), layer.attention.norm.weight, layer.attention.norm.bias, 1e-5)
            h = h + inner.out(attention_by_hand(y, inner.qkv, 8, [4, 4, 4]))
            norm, mlp = layer.feedforward.norm, layer.feedforward.inner
            y = F.layer_norm(h, (32,), norm.weight, norm.bias, 1e-5)
            h = h + mlp.down(F.gelu(mlp.up(y)))
        out = F.pad(block.project_out(h)[:, :-1], (0, 0, 1, 0))
        a, b = out.chunk(2, dim=-1)
        u = ((u - b) * (-a).exp())[:, order.argsort()]
        logdet = logdet - a.sum((1, 2))
    output = model(**given)
    torch.testing.assert_close(output.z, u, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(output.logdet, logdet, atol=1e-4, rtol=1e-5)


def test_starflow_is_the_published_network() -> None:
    """Written plainly: three rotary axes because the model has text, text before the top chain."""
    model, given = disturbed(STARFLOW), inputs(STARFLOW)
    u = given["x"].permute(0, 2, 3, 1).flatten(1, 2)
    angles = torch.zeros(6 + 16, 12)
    for i in range(16):
        for j in range(2):  # 24 / 4 - 4 pairs for a row and as many for a column
            angles[6 + i, j] = (i // 4) * 10000 ** (-j / 2)
            angles[6 + i, 2 + j] = (i % 4) * 10000 ** (-j / 2)
    for i in range(6):
        for j in range(8):
            angles[i, 4 + j] = i / 6 * 4 * 10000 ** (-j / 8)
    turn = torch.polar(torch.ones_like(angles), angles)
    for k, block in enumerate(blocks_of(model)):
        backwards = (k + 1) % 2 == 1
        u = u.flip(1) if backwards else u
        h = block.project_in(torch.cat((block.start.expand(3, 1, -1), u[:, :-1]), dim=1))
        top = k == 2
        if top:
            h = torch.cat((block.prefix(given["text"]), h), dim=1)
        for layer in block.layers:
            inner = layer.attention.inner
            y = layer.attention.norm(h)
            q, k_, v = inner.qkv(y).unflatten(-1, (3, 2, 24)).unbind(2)
            q, k_ = (
                torch.view_as_real(
                    torch.view_as_complex(part.unflatten(-1, (12, 2)).contiguous())
                    * (turn if top else turn[6:])[:, None]
                ).flatten(-2)
                for part in (q, k_)
            )
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k_) / math.sqrt(24)
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -math.inf)
            h = h + inner.out(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))
            h = h + layer.feedforward.inner(layer.feedforward.norm(h))
        h = h[:, 6:] if top else h
        h = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + block.norm.weight)
        a, b = (4 * torch.tanh(block.project_out(h) / 4)).chunk(2, dim=-1)
        u = (u - b) / F.softplus(a + math.log(math.e - 1))
        u = u.flip(1) if backwards else u
    torch.testing.assert_close(model(**given).z, u, atol=2e-5, rtol=2e-5)


def test_rotary_positions_stretch_to_the_trained_grid() -> None:
    small = blocks_of(STARFlow(replace(STARFLOW, trained_grid=8)))[0].turn
    large = blocks_of(STARFlow(replace(STARFLOW, image_size=8)))[0].turn
    every_second = torch.arange(64).view(8, 8)[::2, ::2].flatten()
    torch.testing.assert_close(small, large[:, every_second])


DATA = {"classes": 0, "text_width": 0, "text_tokens": 0}
TEXT = DATA | {"image_size": 32, "channels": 4, "text_width": 2048, "text_tokens": 128}
CLASSES = DATA | {"image_size": 32, "channels": 4, "classes": 1000}
COUNTS = [
    ("TarFlow-2-768-8-8", {"image_size": 64, "channels": 3}, 460_142_784),
    ("TarFlow-2-768-8-8", {"image_size": 64, "channels": 3, "classes": 1000}, 466_286_784),
    ("TarFlow-4-1024-8-8", {"image_size": 64, "channels": 3, "classes": 1000}, 817_636_096),
    ("TarFlow-4-1024-8-8", {"image_size": 128, "channels": 3, "classes": 1000}, 823_927_552),
    ("TarFlow-4-1024-8-8", {"image_size": 128, "channels": 3}, 815_735_552),
    ("TarFlow-8-768-8-8", {"image_size": 256, "channels": 3, "classes": 3}, 463_481_856),
    ("STARFlow-1.4B", CLASSES, 1_412_255_816),
    ("STARFlow-1.4B", TEXT, 1_414_400_072),
    ("STARFlow-XL-v1", CLASSES, 1_412_255_816),
    ("STARFlow-3B", TEXT, 3_858_281_544),
    ("STARFlow-XXL-v1", TEXT, 3_889_735_752),
    ("STARFlow-V-7B", TEXT | {"channels": 48}, 5_977_211_744),
]  # fmt: skip
FAMILIES = {
    "TarFlow": Family(
        "tarflow", "likelihood", TarFlowConfig, TarFlow, forward_flops, tarflow.PUBLISHED
    ),
    "STARFlow": Family(
        "starflow",
        "likelihood",
        STARFlowConfig,
        STARFlow,
        forward_flops,
        starflow.PUBLISHED,
    ),
}


@pytest.mark.parametrize(("name", "data", "expected"), COUNTS)
def test_published_sizes_have_the_published_number_of_parameters(name, data, expected) -> None:
    family = FAMILIES[name.partition("-")[0]]
    with torch.device("meta"):
        model = architecture(family, name, {}, DATA | data).build()
    assert parameter_count(model) == expected


def test_the_top_block_of_the_published_3b_model() -> None:
    with torch.device("meta"):
        model = architecture(FAMILIES["STARFlow"], "STARFlow-3B", {}, TEXT).build()
    counts = [parameter_count(block) for block in model.flow_blocks]
    assert counts == [226_615_308] * 5 + [2_725_205_004]


@pytest.mark.parametrize(
    "name", ["tarflow", "starflow with text", "starflow with classes and all options"]
)
def test_the_cost_formula_equals_the_operator_count(name) -> None:
    config = CONFIGS[name]
    # The counter knows no fused attention of the CPU; the meta device has none.
    model = fresh(config).to("meta")
    given = {key: value.to("meta") for key, value in inputs(config).items()}
    with FlopCounterMode(display=False) as forward:
        model(**given)
    assert forward.get_total_flops() / 3 == forward_flops(config)


def test_every_parameter_learns_but_key_biases_that_cannot_matter() -> None:
    for config in (TARFLOW, RICH):
        model, given = disturbed(config), inputs(config)
        output = model(**given)
        (output.z.square().mean() - output.logdet.mean()).backward()
        for name, weight in model.named_parameters():
            learned = weight.grad.abs() > 0
            if name.endswith("qkv.bias"):
                assert not learned[32:64].any()
                learned = learned[:32]
            if name.endswith(".position"):
                learned = learned[:-1]  # the last token predicts nothing
            assert learned.any(), name


REFUSED = [
    (TARFLOW, {"patch": 3}, "data.image_size = 8 is not divisible by model.patch = 3"),
    (TARFLOW, {"patch": 8}, "use a smaller patch"),
    (TARFLOW, {"clip": -1.0}, "model.clip = -1.0 is negative"),
    (TARFLOW, {"head_width": 7}, "not a multiple of model.head_width = 7"),
    (RICH, {"kv_heads": 3}, "model.kv_heads = 3 does not divide"),
    (STARFLOW, {"layers": ()}, "model.layers"),
    (STARFLOW, {"clip": -1.0}, "model.clip"),
    (STARFLOW, {"head_width": 16}, "model.head_width = 16"),
]


@pytest.mark.parametrize(("base", "changes", "message"), REFUSED)
def test_shapes_that_cannot_be_are_refused(base, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        replace(base, **changes)
