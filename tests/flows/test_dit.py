"""The DiT backbone is the published one, and its shortcuts change nothing."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import initialise
from flows.models.dit import DiT, DiTConfig, parameter_count
from flows.models.embeddings import TimeEmbedding, patchify, sincos_positions, unpatchify
from flows.models.norms import layer_norm

CONFIG = DiTConfig(
    image_size=12, channels=3, classes=5, patch=3, width=32, depth=3, heads=4, learn_sigma=False
)


def with_(**changes) -> DiTConfig:
    return DiTConfig(**(vars(CONFIG) | changes))


def fresh(config: DiTConfig = CONFIG) -> DiT:
    model = DiT(config)
    initialise(model, seed=0)
    return model


def disturbed(config: DiTConfig = CONFIG) -> DiT:
    """A model in which every weight matters: a fresh one hides all that stands behind a zero."""
    model = fresh(config)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.normal_(0.0, 0.1, generator=generator)
    return model


def inputs(config: DiTConfig = CONFIG, batch: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    side = config.image_size
    x = torch.randn(batch, config.channels, side, side, generator=generator)
    t = torch.rand(batch, generator=generator)
    return x, t, torch.randint(0, config.classes + 1, (batch,), generator=generator)


def plain_forward(model: DiT, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The published network written plainly: convolution, explicit softmax, no fused operation."""
    config = model.config
    patch, width, heads = config.patch, config.width, config.heads
    norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
    kernel = model.patches.weight.unflatten(1, (patch, patch, config.channels)).permute(0, 3, 1, 2)
    h = F.conv2d(x, kernel, model.patches.bias, stride=patch).flatten(2).transpose(1, 2)
    h = h + model.position
    frequency = torch.exp(-math.log(10000.0) * torch.arange(128) / 128)
    angle = t[:, None] * frequency[None]
    time = torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)
    c = model.time.out(F.silu(model.time.up(time))) + model.label.weight[label]
    for block in model.blocks:
        parts = block.modulation(F.silu(c)).chunk(6, dim=1)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (p[:, None] for p in parts)
        y = norm(h) * (1 + scale_1) + shift_1
        qkv = F.linear(y, block.attention.qkv.weight, block.attention.qkv.bias)
        q, k, v = (
            part.unflatten(-1, (heads, width // heads)).transpose(1, 2)
            for part in qkv.split(width, dim=-1)
        )
        scores = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
        h = h + gate_1 * block.attention.out((scores @ v).transpose(1, 2).flatten(2))
        y = norm(h) * (1 + scale_2) + shift_2
        mlp = block.feedforward
        h = h + gate_2 * mlp.down(F.gelu(mlp.up(y), approximate="tanh"))
    shift, scale = (p[:, None] for p in model.final.modulation(F.silu(c)).chunk(2, dim=1))
    out = model.final.out(norm(h) * (1 + scale) + shift)
    rows = config.image_size // patch
    image = out.reshape(len(x), rows, rows, patch, patch, config.outputs)
    image = torch.einsum("nhwpqc->nchpwq", image).reshape(len(x), -1, *x.shape[-2:])
    return image[:, : config.channels]


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_equals_the_plain_network_in_output_and_gradient(learn_sigma: bool) -> None:
    config = with_(learn_sigma=learn_sigma)
    model = disturbed(config)
    names, weights = zip(*model.named_parameters(), strict=True)
    results = []
    for forward in (model, lambda *a: plain_forward(model, *a)):
        out = forward(*inputs(config))
        # The sum of squares gives every output another gradient.
        results.append((out, torch.autograd.grad(out.square().sum(), weights)))
    (out, gradients), (plain_out, plain_gradients) = results
    torch.testing.assert_close(out, plain_out, rtol=1e-5, atol=1e-5)
    for name, gradient, plain in zip(names, gradients, plain_gradients, strict=True):
        gradient, plain = gradient.clone(), plain.clone()
        if name.endswith("qkv.bias"):
            key = slice(config.width, 2 * config.width)
            assert torch.equal(gradient[key], torch.zeros(config.width))
            # What it is spared: rounding noise in the place of a mathematical zero.
            assert 0.0 < plain[key].abs().max() < 1e-4 * plain.abs().max()
            plain[key] = 0.0
        error = (gradient - plain).norm() / plain.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_a_fresh_network_is_zero_and_its_blocks_are_the_identity() -> None:
    model = fresh()
    x, t, label = inputs()
    assert torch.equal(model(x, t, label), torch.zeros_like(x))
    tokens, condition = torch.randn(2, CONFIG.tokens, CONFIG.width), torch.randn(2, CONFIG.width)
    for block in model.blocks:
        assert torch.equal(block(tokens, condition), tokens)
        assert torch.equal(block(tokens, -3.0 * condition), tokens)


def test_initial_weights_follow_the_paper() -> None:
    weights = dict(fresh(with_(width=128, heads=4)).named_parameters())
    for name, weight in weights.items():
        if name.endswith("bias") or "modulation" in name or name.startswith("final"):
            assert not weight.any(), name
        elif name.startswith(("label", "time")):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            bound = math.sqrt(6.0 / sum(weight.shape))
            assert 0.97 * bound < weight.abs().max() <= bound, name


def test_the_forward_draws_nothing() -> None:
    model, before = disturbed(), torch.get_rng_state()
    first, second = model(*inputs()), model(*inputs())
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_time_label_and_place_all_matter() -> None:
    model = disturbed()
    x, t, label = inputs()
    out = model(x, t, label)
    assert not torch.allclose(model(x, t + 0.01, label), out, atol=1e-5)
    assert not torch.allclose(model(x, t, (label + 1) % 6), out, atol=1e-4)
    moved = model(x.roll(CONFIG.patch, dims=-1), t, label).roll(-CONFIG.patch, dims=-1)
    assert not torch.allclose(moved, out, atol=1e-4)


def test_patches_are_ordered_row_column_channel_and_come_back() -> None:
    image = torch.randn(2, 3, 8, 12)
    tokens = patchify(image, 4)
    assert tokens.shape == (2, 6, 48)
    # Token 4 is the second row of patches, second column; feature 1 of pixel (2, 3) in it.
    assert torch.equal(tokens[:, 4, (2 * 4 + 3) * 3 + 1], image[:, 1, 4 + 2, 4 + 3])
    assert torch.equal(unpatchify(tokens, 4, 8), image)


def test_position_table_says_column_then_row() -> None:
    table = sincos_positions(side=5, width=16)
    assert torch.equal(table[0], torch.tensor([0.0] * 4 + [1.0] * 4).repeat(2))
    row, column = 3, 2
    frequencies = [10000.0 ** (-j / 4) for j in range(4)]
    expected = [
        f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in frequencies
    ]
    torch.testing.assert_close(table[row * 5 + column], torch.tensor(expected))


def test_time_features_are_cosines_then_sines_of_the_time_itself() -> None:
    features = TimeEmbedding(8).sinusoid(torch.tensor([0.0, 0.7]))
    assert torch.equal(features[0], torch.tensor([1.0] * 128 + [0.0] * 128))
    expected = [f(0.7 * 10000.0 ** (-j / 128)) for f in (math.cos, math.sin) for j in range(128)]
    torch.testing.assert_close(features[1], torch.tensor(expected))


def test_born_on_the_meta_device_it_is_the_same_model() -> None:
    with torch.device("meta"):
        model = DiT(CONFIG)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    model.position.fill_(float("nan"))
    initialise(model, seed=0)
    born_here = fresh()
    assert torch.equal(model.position, born_here.position)
    for (name, weight), other in zip(model.named_parameters(), born_here.parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_the_position_table_is_counted_but_not_saved() -> None:
    model = DiT(CONFIG)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    table = CONFIG.tokens * CONFIG.width
    assert parameter_count(model, False) - parameter_count(model, True) == table


def test_norm_statistics_of_bfloat16_are_float32() -> None:
    x = (torch.randn(64, 1000) + 30.0).bfloat16()
    centered = x.double() - x.double().mean(1, keepdim=True)
    exact = centered / (centered.square().mean(1, keepdim=True) + 1e-6).sqrt()
    # Rounding to bfloat16 is 2^-9; statistics in bfloat16 would be off by 1e-1.
    torch.testing.assert_close(layer_norm(x).double(), exact, rtol=2**-8, atol=1e-4)


def test_bfloat16_weights_gathered_or_cast_give_the_same_bits() -> None:
    model = disturbed()
    gathered = copy.deepcopy(model)
    for weight in gathered.parameters():
        weight.data = weight.data.bfloat16()
    exact = model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        cast, precast = model(*inputs()), gathered(*inputs())
    assert torch.equal(cast, precast)
    assert 0.0 < (cast - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"width": 100, "heads": 3},
            r"model.width = 100 is not divisible by model.heads = 3; use 1, 2",
        ),
        (
            {"patch": 5},
            r"data.image_size = 12 is not divisible by model.patch = 5; .* 1, 2, 3, 4, 6 or",
        ),
        ({"width": 30, "heads": 3}, r"model.width = 30 is not divisible by 4"),
    ],
)
def test_impossible_sizes_are_refused_by_key(changes: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        with_(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu() -> None:
    model = disturbed()
    expected = model(*inputs())
    out = model.cuda()(*(tensor.cuda() for tensor in inputs()))
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-3, atol=1e-3)
