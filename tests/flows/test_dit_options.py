"""Every option of the DiT is what its paper says, costs what is said, and changes nothing while it is off."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flows.errors import UserError
from flows.initialise import initialise
from flows.models.dit import Aligned, DiT, DiTConfig, forward_flops
from flows.models.norms import DynamicTanh, LayerNorm, NormKind, RMSNorm, norm_of

PLAIN = DiTConfig(image_size=12, channels=3, classes=5, patch=3, width=48, depth=3, heads=3)
LIGHTNING = {"norm": "rms", "norm_affine": True, "feedforward": "swiglu", "rope": True}
OPTIONS = {
    "plain": {},
    "lightning": LIGHTNING,
    "lightning with all": LIGHTNING | {"qk_norm": True, "wo_shift": True},
    "affine": {"norm_affine": True},
    "rms": {"norm": "rms"},
    "dyt": {"norm": "dyt"},
    "dyt affine": {"norm": "dyt", "norm_affine": True},
    "peri": {"norm_placement": "peri"},
    "peri rms": {"norm_placement": "peri", "norm": "rms", "norm_affine": True},
    "post": {"norm_placement": "post"},
    "qk_norm": {"qk_norm": True},
    "rope": {"rope": True},
    "swiglu": {"feedforward": "swiglu"},
    "wo_shift": {"wo_shift": True},
    "text": {"text_width": 10, "text_tokens": 6},
    "align": {"align_depth": 2, "align_width": 7},
}


def config_of(name: str) -> DiTConfig:
    return DiTConfig(**(vars(PLAIN) | OPTIONS[name]))


def fresh(config: DiTConfig) -> DiT:
    model = DiT(config)
    initialise(model, seed=0)
    return model


def disturbed(config: DiTConfig) -> DiT:
    """A model in which every weight matters: a fresh one hides all that stands behind a zero."""
    model = fresh(config)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def inputs(config: DiTConfig, batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    side = config.image_size
    given = {
        "x": torch.randn(batch, config.channels, side, side, generator=generator),
        "t": torch.rand(batch, generator=generator),
        "label": torch.randint(0, config.classes + 1, (batch,), generator=generator),
    }
    if config.text_width:
        text = torch.randn(batch, config.text_tokens, config.text_width, generator=generator)
        text[1, 4:] = 0.0
        text[2] = 0.0
        given["text"] = text
    return given


def plain_norm(module: nn.Module, x: Tensor) -> Tensor:
    """Each norm from its definition; a missing one is the identity."""
    if isinstance(module, nn.Identity):
        return x
    if isinstance(module, DynamicTanh):
        y = torch.tanh(module.alpha * x)
    elif isinstance(module, RMSNorm):
        y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    else:
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    y = y * getattr(module, "weight", 1.0)
    return y + getattr(module, "bias", 0.0)


def plain_turn(x: Tensor, side: int) -> Tensor:
    """Head by head as complex numbers: the first half of the features by row, the rest by column."""
    pairs = x.shape[-1] // 4
    frequency = 10000.0 ** (-torch.arange(pairs).double() / pairs)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle = torch.cat([row.reshape(-1, 1) * frequency, column.reshape(-1, 1) * frequency], dim=1)
    numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.exp(1j * angle)).flatten(-2).float()


def plain_attention(model: DiT, block: nn.Module, y: Tensor) -> Tensor:
    config = model.config
    heads, width = config.heads, config.width
    qkv = F.linear(y, block.attention.qkv.weight, block.attention.qkv.bias)
    q, k, v = (
        part.unflatten(-1, (heads, width // heads)).transpose(1, 2)
        for part in qkv.split(width, dim=-1)
    )
    if config.qk_norm:
        q = plain_norm(block.attention.query_norm, q)
        k = plain_norm(block.attention.key_norm, k)
    if config.rope:
        side = config.image_size // config.patch
        q, k = plain_turn(q, side), plain_turn(k, side)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1)
    return block.attention.out((scores @ v).transpose(1, 2).flatten(2))


def plain_feedforward(model: DiT, block: nn.Module, y: Tensor) -> Tensor:
    up = block.feedforward.up(y)
    if model.config.feedforward == "gelu":
        return block.feedforward.down(F.gelu(up, approximate="tanh"))
    hidden = up.shape[-1] // 2
    assert hidden == int(2 / 3 * 4 * model.config.width)
    gate, value = up[..., :hidden], up[..., hidden:]
    return block.feedforward.down(gate / (1 + torch.exp(-gate)) * value)


def plain_forward(
    model: DiT, x: Tensor, t: Tensor, label: Tensor, text: Tensor | None = None
) -> Tensor | Aligned:
    """All options written out, one operation at a time."""
    config = model.config
    patch = config.patch
    kernel = model.patches.weight.unflatten(1, (patch, patch, config.channels)).permute(0, 3, 1, 2)
    h = F.conv2d(x, kernel, model.patches.bias, stride=patch).flatten(2).transpose(1, 2)
    h = h + model.position
    if config.norm_placement == "peri":
        h = plain_norm(model.embedding_norm, h)
    c = model.time(t) + model.label.weight[label]
    if text is not None:
        means = [row[row.abs().sum(-1) > 0] for row in text]
        mean = torch.stack([m.mean(0) if len(m) else torch.zeros(m.shape[-1]) for m in means])
        c = c + model.text(mean)
    projection = None
    for index, block in enumerate(model.blocks):
        vectors = block.modulation(F.silu(c)).unflatten(-1, (-1, config.width)).unbind(1)
        parts = iter(part[:, None] for part in vectors)
        for number, layer in ((1, plain_attention), (2, plain_feedforward)):
            shift = 0.0 if config.wo_shift else next(parts)
            scale, gate = next(parts), next(parts)
            y = h
            if config.norm_placement != "post":
                y = plain_norm(getattr(block, f"norm_{number}"), y)
            y = layer(model, block, y * (1 + scale) + shift)
            if config.norm_placement == "peri":
                y = plain_norm(getattr(block, f"update_norm_{number}"), y)
            h = h + gate * y
            if config.norm_placement == "post":
                h = plain_norm(getattr(block, f"sum_norm_{number}"), h)
        if index + 1 == config.align_depth:
            hidden = F.silu(model.projector.middle(F.silu(model.projector.up(h))))
            projection = model.projector.out(hidden)
    shift, scale = (p[:, None] for p in model.final.modulation(F.silu(c)).chunk(2, dim=1))
    out = model.final.out(plain_norm(model.final.norm, h) * (1 + scale) + shift)
    rows = config.image_size // patch
    image = out.reshape(len(x), rows, rows, patch, patch, config.outputs)
    image = torch.einsum("nhwpqc->nchpwq", image).reshape(len(x), -1, *x.shape[-2:])
    return image if projection is None else Aligned(image, projection)


def numbers_of(outputs: Tensor | Aligned) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else torch.cat([o.flatten() for o in outputs])


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_plain_network_in_output_and_gradient(name: str) -> None:
    config = config_of(name)
    model, given = disturbed(config), inputs(config)
    names, weights = zip(*model.named_parameters(), strict=True)
    results = []
    for forward in (model, lambda **given: plain_forward(model, **given)):
        out = numbers_of(forward(**given))
        # The sum of squares gives every output another gradient.
        results.append((out, torch.autograd.grad(out.square().sum(), weights)))
    (out, gradients), (plain_out, plain_gradients) = results
    torch.testing.assert_close(out, plain_out, rtol=1e-5, atol=2e-5)
    for name, gradient, plain in zip(names, gradients, plain_gradients, strict=True):
        gradient, plain = gradient.clone(), plain.clone()
        if name.endswith("qkv.bias") and not (config.qk_norm or config.rope):
            key = slice(config.width, 2 * config.width)
            assert not gradient[key].any()
            plain[key] = 0.0
        error = (gradient - plain).norm() / plain.norm()
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", ["qk_norm", "rope"])
def test_a_key_bias_counts_and_learns_where_keys_are_normalised_or_turned(name: str) -> None:
    config = config_of(name)
    model, given = disturbed(config), inputs(config)
    out = model(**given)
    bias = model.blocks[0].attention.qkv.bias
    (gradient,) = torch.autograd.grad(out.square().sum(), bias)
    key = slice(config.width, 2 * config.width)
    assert gradient[key].norm() > 1e-2 * gradient.norm()
    bias.data[key] += 1.0
    assert not torch.allclose(model(**given), out, atol=1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fresh_network_is_zero_and_its_blocks_do_nothing(name: str) -> None:
    config = config_of(name)
    model, given = fresh(config), inputs(config)
    outputs = model.eval()(**given)
    assert torch.equal(outputs, torch.zeros_like(given["x"]))
    tokens, condition = torch.randn(2, config.tokens, config.width), torch.randn(2, config.width)
    for block in model.blocks:
        after = block(tokens, condition, model.turn)
        if config.norm_placement == "post":
            once = block.sum_norm_1(tokens)
            torch.testing.assert_close(after, once, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(after, tokens)


def test_the_options_of_today_hold_the_weights_of_yesterday() -> None:
    """Names and order of the parameters of a plain DiT are part of every checkpoint."""
    assert [name for name, _ in DiT(PLAIN).named_parameters()][:17] == [
        "patches.weight", "patches.bias", "time.up.weight", "time.up.bias", "time.out.weight",
        "time.out.bias", "label.weight", "blocks.0.modulation.weight", "blocks.0.modulation.bias",
        "blocks.0.attention.qkv.weight", "blocks.0.attention.qkv.bias", "blocks.0.attention.out.weight",
        "blocks.0.attention.out.bias", "blocks.0.feedforward.up.weight", "blocks.0.feedforward.up.bias",
        "blocks.0.feedforward.down.weight", "blocks.0.feedforward.down.bias",
    ]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cost_formula_equals_the_operator_count(name: str) -> None:
    config = config_of(name)
    with torch.device("meta"):
        model = DiT(config)
        given = {key: value.to("meta") for key, value in inputs(config).items()}
    with FlopCounterMode(display=False) as forward:
        outputs = model(**given)
    assert forward.get_total_flops() == 4 * forward_flops(config)
    with FlopCounterMode(display=False) as train:
        outputs = numbers_of(model(**given))
        outputs.sum().backward()
    # What enters the first layers needs no gradient.
    first = config.tokens * config.patch**2 * config.channels + 256 + config.text_width
    assert train.get_total_flops() == 4 * (3 * forward_flops(config) - 2 * first * config.width)


@pytest.mark.parametrize("name", ["lightning with all", "affine", "dyt affine", "peri rms", "post"])
def test_bfloat16_weights_gathered_or_cast_give_the_same_bits(name: str) -> None:
    config = config_of(name)
    model, given = disturbed(config), inputs(config)
    gathered = copy.deepcopy(model)
    for weight in gathered.parameters():
        weight.data = weight.data.bfloat16()
    exact = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        cast, precast = model(**given), gathered(**given)
    assert torch.equal(cast, precast)
    assert 0.0 < (cast - exact).norm() / exact.norm() < 0.05


def test_born_on_the_meta_device_it_is_the_same_model() -> None:
    config = config_of("lightning with all")
    with torch.device("meta"):
        model = DiT(config)
    model.to_empty(device="cpu")
    for table in model.buffers():
        table.fill_(float("nan"))
    initialise(model, seed=0)
    born_here = fresh(config)
    for pair in zip(model.buffers(), born_here.buffers(), strict=True):
        assert torch.equal(*pair)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_moving_the_image_over_the_grid_keeps_what_rotary_attention_sees() -> None:
    """Scores depend on the distance between places: turns of the places (r+a, c+b) give the same ones."""
    model = disturbed(config_of("rope"))
    attention, x = model.blocks[0].attention, torch.randn(2, 4, 48)
    side = 4
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 2]])

    def at(shift: int) -> Tensor:
        rows = (places[:, 0] + shift) * side + places[:, 1] + shift
        return attention(x, model.turn[:, rows])

    torch.testing.assert_close(at(1), at(0), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(attention(x, model.turn[:, :4]), at(0), atol=1e-4)


def test_padding_of_a_text_and_the_order_of_its_words_do_not_matter() -> None:
    config = config_of("text")
    model, given = disturbed(config), inputs(config)
    out, text = model(**given), given["text"]
    longer = torch.cat((text, torch.zeros(4, 3, config.text_width)), dim=1)
    torch.testing.assert_close(model(**given | {"text": longer}), out, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model(**given | {"text": text.flip(1)}), out, rtol=1e-5, atol=1e-5)
    other = model(**given | {"text": text + (text != 0)})
    assert torch.equal(other[2], out[2])  # no text
    assert all(not torch.allclose(other[row], out[row], atol=1e-4) for row in (0, 1, 3))
    with pytest.raises(ValueError, match="takes a text"):
        model(given["x"], given["t"], given["label"])


def test_the_projector_speaks_in_training_alone_and_teaches_the_blocks_before_it() -> None:
    config = config_of("align")
    model, given = disturbed(config), inputs(config)
    aligned = model(**given)
    assert aligned.projection.shape == (4, config.tokens, config.align_width)
    assert torch.equal(model.eval()(**given), aligned.prediction)
    aligned.projection.square().sum().backward()
    taught = [block.modulation.weight.grad is not None for block in model.blocks]
    assert taught == [True, True, False]


def test_peri_norm_forgets_the_size_of_an_update() -> None:
    """Kim et al. 2025: the last weights of a layer times c change nothing; before the norm they do."""
    config = config_of("peri")
    model, given = disturbed(config), inputs(config)
    pre = DiT(PLAIN)
    pre.load_state_dict(model.state_dict())
    out, pre_out = model(**given), pre(**given)
    for network in (model, pre):
        for last in (network.blocks[1].attention.out, network.blocks[1].feedforward.down):
            last.weight.data *= 8.0
            last.bias.data *= 8.0
    # Not exactly: the norm's epsilon, 1e-6, weighs 64 times less beside the variance.
    torch.testing.assert_close(model(**given), out, rtol=1e-4, atol=1e-4)
    assert (pre(**given) - pre_out).norm() > 0.1 * pre_out.norm()


def test_peri_norm_bounds_what_a_block_adds() -> None:
    config = config_of("peri")
    model = disturbed(config)
    block, condition = model.blocks[0], torch.randn(2, config.width)
    x = 100.0 * torch.randn(2, config.tokens, config.width)
    for weight in block.attention.parameters():
        weight.data *= 50.0
    first, second = block._modulations(condition)
    bound = math.sqrt(config.width) * (first.gate.abs().amax(-1) + second.gate.abs().amax(-1))
    assert bool(((block(x, condition) - x).norm(dim=-1) <= bound * (1 + 1e-5)).all())


class Operations(TorchDispatchMode):
    """The names of all operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_dyt_sums_nothing_over_features() -> None:
    norm = DynamicTanh(12, affine=True)
    for weight in norm.parameters():
        nn.init.normal_(weight, generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(4))
    with Operations() as ran:
        whole = norm(x)
    assert ran.names - {"detach"} == {"mul", "tanh", "addcmul"}
    parts = []
    for columns in (slice(0, 5), slice(5, 12)):
        part = DynamicTanh(0, affine=True)
        part.alpha, part.weight = norm.alpha, nn.Parameter(norm.weight[columns])
        part.bias = nn.Parameter(norm.bias[columns])
        parts.append(part(x[:, columns]))
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_statistics_of_bfloat16_far_from_zero_are_exact(kind: NormKind, affine: bool) -> None:
    """In float32, inputs with mean 1000 are normalised to 1e-6 of what float64 gives.

    Their deviation is 100: the kernel's error is that of the ratio of mean to deviation in float32.
    """
    generator = torch.Generator().manual_seed(5)
    x = (1000.0 + 100.0 * torch.randn(64, 512, generator=generator)).bfloat16()
    norm = norm_of(kind, 512, affine=affine)
    for name, weight in norm.named_parameters():
        weight.data.fill_(1.5 if name == "weight" else 0.25)
    exact = x.double()
    if kind == "layer":
        exact = exact - exact.mean(-1, keepdim=True)
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if affine:
        exact = exact * 1.5 + (0.25 if kind == "layer" else 0.0)
    in_float32, in_bfloat16 = norm(x.float()), norm(x)
    assert ((in_float32 - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-6
    assert in_bfloat16.dtype == torch.bfloat16
    # Statistics in bfloat16 would be off by a tenth; rounding the result is 2^-8 of it.
    torch.testing.assert_close(in_bfloat16.double(), exact, rtol=2**-8, atol=2e-6)


def test_an_affine_layer_norm_is_that_of_pytorch() -> None:
    ours, theirs = LayerNorm(12, affine=True), nn.LayerNorm(12, eps=1e-6)
    for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        weight.data.copy_(torch.randn(12, generator=torch.Generator().manual_seed(len(name))))
        other.data.copy_(weight.data)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(6))
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope": True, "heads": 8}, r"model.rope .* model.width / model.heads = 6, must be"),
        (
            {"align_depth": 4, "align_width": 7},
            r"model.align_depth = 4 is deeper than model.depth = 3",
        ),
        ({"align_depth": 2}, r"model.align_depth = 2 and model.align_width = 0: give both"),
        ({"align_width": 2}, r"model.align_depth = 0 and model.align_width = 2: give both"),
    ],
)
def test_impossible_options_are_refused_by_key(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DiTConfig(**(vars(PLAIN) | changes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lightning with all", "peri", "post", "dyt affine"])
def test_compiled_blocks_are_the_same(name: str) -> None:
    config = config_of(name)
    model, given = disturbed(config), inputs(config)
    out = model(**given)
    for block in model.blocks:
        block.compile(fullgraph=True)
    torch.testing.assert_close(model(**given), out, rtol=1e-5, atol=2e-5)
