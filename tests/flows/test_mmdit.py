"""The MMDiT is the published one, in all its options, and keeps its promises about text and places."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flows.errors import UserError
from flows.initialise import initialise
from flows.models.embeddings import patchify, unpatchify
from flows.models.family import parameter_count
from flows.models.mmdit import MMDiT, forward_flops
from flows.models.mmdit_blocks import Double, Single
from flows.models.mmdit_config import MMDiTConfig
from flows.models.mmdit_sizes import PUBLISHED

PLAIN = MMDiTConfig(
    image_size=12,
    channels=3,
    classes=5,
    text_width=10,
    text_tokens=6,
    patch=3,
    width=48,
    heads=2,
    double_depth=2,
    single_depth=2,
)
SD3 = {"single_depth": 0, "rope": False, "vector_width": 9}
OPTIONS = {
    "plain": {},
    "flux": {"vector_width": 9, "guidance": 3.5, "time": "reversed", "mask_text": False},
    "sd3": SD3,
    "without qk_norm": {"qk_norm": False},
    "table": {"qk_norm": False, "rope": False},
    "conditions": {"pool_text": True, "class_label": True, "vector_width": 7},
}
LATENTS = {
    "image_size": 64,
    "channels": 16,
    "classes": 1000,
    "text_width": 4096,
    "text_tokens": 256,
}
EMOJI = {"image_size": 32, "channels": 3, "classes": 9, "text_width": 64, "text_tokens": 16}


def config_of(name: str) -> MMDiTConfig:
    return MMDiTConfig(**(vars(PLAIN) | OPTIONS[name]))


def fresh(config: MMDiTConfig) -> MMDiT:
    model = MMDiT(config)
    initialise(model, seed=0)
    return model


def disturbed(config: MMDiTConfig = PLAIN) -> MMDiT:
    """A model in which every weight matters: a fresh one hides all that stands behind a zero."""
    model = fresh(config)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def inputs(config: MMDiTConfig = PLAIN, batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    side = config.image_size
    text = torch.randn(batch, config.text_tokens, config.text_width, generator=generator)
    text[1, 4:] = 0.0
    text[2] = 0.0
    given = {
        "x": torch.randn(batch, config.channels, side, side, generator=generator),
        "t": torch.rand(batch, generator=generator),
        "label": torch.randint(0, config.classes + 1, (batch,), generator=generator),
        "text": text,
    }
    if config.vector_width:
        given["vector"] = torch.randn(batch, config.vector_width, generator=generator)
    return given


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    return module.out(F.silu(module.up(x)))


def plain_heads(qkv: Tensor, module: nn.Module, config: MMDiTConfig) -> list[Tensor]:
    """Queries, keys and values as (batch, tokens, heads, head width), normed."""
    q, k, v = (part.unflatten(-1, (config.heads, -1)) for part in qkv.chunk(3, dim=-1))
    if config.qk_norm:
        norms = (module.query_norm, module.key_norm)
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
            for x, norm in zip((q, k), norms, strict=True)
        )
    return [q, k, v]


def plain_turn(x: Tensor, config: MMDiTConfig) -> Tensor:
    """Pair by pair as complex numbers: none turn for words, (0, row, column) for the image."""
    side, pairs = config.image_size // config.patch, config.pairs
    ids = [(0, 0, 0)] * config.text_tokens + [(0, r, c) for r in range(side) for c in range(side)]
    angle = torch.tensor(
        [
            [place[axis] * 10000.0 ** (-j / n) for axis, n in enumerate(pairs) for j in range(n)]
            for place in ids
        ],
        dtype=torch.float64,
    )
    numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = numbers * torch.exp(1j * angle)[None, :, None]
    return torch.view_as_real(turned).flatten(-2).float()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, text: Tensor, config: MMDiTConfig) -> Tensor:
    if config.rope:
        q, k = plain_turn(q, config), plain_turn(k, config)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    if config.mask_text:
        padding = (text == 0.0).all(-1)
        seen = torch.cat([~padding, torch.ones(len(text), config.tokens, dtype=torch.bool)], dim=1)
        scores = scores.masked_fill(~seen[:, None, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def plain_forward(
    model: MMDiT,
    x: Tensor,
    t: Tensor,
    label: Tensor,
    text: Tensor,
    vector: Tensor | None = None,
    guidance: float = 3.5,
) -> Tensor:
    """The networks of both papers written plainly, two lists of tokens all the way."""
    config = model.config
    norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
    native = 1.0 - t if config.time == "reversed" else t
    c = mlp(model.time, model.time.sinusoid(1000.0 * native))
    if config.guidance:
        c = c + mlp(model.guidance, model.time.sinusoid(torch.full_like(t, 1000.0 * guidance)))
    if vector is not None:
        c = c + mlp(model.vector, vector)
    if config.pool_text:
        rows = (text != 0.0).any(-1, keepdim=True).float()
        c = c + mlp(model.pooled, (text * rows).sum(1) / rows.sum(1).clamp(min=1.0))
    if config.class_label:
        c = c + model.label.weight[label]
    c = F.silu(c)[:, None]
    h_text = model.words(text)
    h = model.patches(patchify(x, config.patch))
    if not config.rope:
        h = h + model.position
    for index, block in enumerate(model.blocks):
        if index < config.double_depth:
            last = index == config.double_depth - 1 and not config.single_depth
            of_text = block.text.modulation(c).chunk(2 if last else 6, dim=-1)
            of_image = block.image.modulation(c).chunk(6, dim=-1)
            pair = [
                plain_heads(stream.qkv(norm(y) * (1 + m[1]) + m[0]), stream, config)
                for stream, y, m in ((block.text, h_text, of_text), (block.image, h, of_image))
            ]
            joint = [torch.cat(both, dim=1) for both in zip(*pair, strict=True)]
            mixed = plain_attention(*joint, text, config)
            mixed_text, mixed_image = mixed.tensor_split([config.text_tokens], dim=1)
            h = plain_update(block.image, h, mixed_image, of_image, norm)
            if not last:
                h_text = plain_update(block.text, h_text, mixed_text, of_text, norm)
        else:
            both = torch.cat([h_text, h], dim=1)
            shift, scale, gate = block.modulation(c).chunk(3, dim=-1)
            up = block.up(norm(both) * (1 + scale) + shift)
            qkv, hidden = up.tensor_split([3 * config.width], dim=-1)
            mixed = plain_attention(*plain_heads(qkv, block, config), text, config)
            joined = torch.cat([mixed, F.gelu(hidden, approximate="tanh")], dim=-1)
            both = both + gate * block.down(joined)
            h_text, h = both.tensor_split([config.text_tokens], dim=1)
    shift, scale = model.final.modulation(c).chunk(2, dim=-1)
    out = model.final.out(norm(h) * (1 + scale) + shift)
    return unpatchify(out, config.patch, config.image_size)


def plain_update(
    stream: nn.Module, h: Tensor, mixed: Tensor, m: tuple[Tensor, ...], norm: nn.Module
) -> Tensor:
    h = h + m[2] * stream.out(mixed)
    up = stream.feedforward.up(norm(h) * (1 + m[4]) + m[3])
    return h + m[5] * stream.feedforward.down(F.gelu(up, approximate="tanh"))


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_plain_network_in_output_and_gradient(name: str) -> None:
    config = config_of(name)
    model, given = disturbed(config), inputs(config)
    names, weights = zip(*model.named_parameters(), strict=True)
    results = []
    for forward in (model, lambda **given: plain_forward(model, **given)):
        out = forward(**given)
        # The sum of squares gives every output another gradient.
        loss = out.square().sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        results.append((out, gradients))
    (out, gradients), (plain_out, plain_gradients) = results
    torch.testing.assert_close(out, plain_out, rtol=1e-5, atol=2e-5)
    for name, gradient, plain in zip(names, gradients, plain_gradients, strict=True):
        gradient, plain = gradient.clone(), plain.clone()
        if name.endswith(".up.bias") and isinstance(model.get_submodule(name[:-8]), Single):
            key = slice(config.width, 2 * config.width)
            if not (config.qk_norm or config.rope):
                assert not gradient[key].any()
                plain[key] = 0.0
            else:
                assert plain[key].norm() > 1e-3 * plain.norm()
        if name == "blocks.1.text.query_norm.weight" and not config.single_depth:
            assert not gradient.any()  # words ask, for nobody
            continue
        error = (gradient - plain).norm() / plain.norm()
        assert error < 3e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_fresh_network_is_zero_and_its_blocks_are_the_identity(name: str) -> None:
    config = config_of(name)
    model, given = fresh(config), inputs(config)
    assert torch.equal(model(**given), torch.zeros_like(given["x"]))
    tokens = torch.randn(2, config.text_tokens + config.tokens, config.width)
    for block in model.blocks:
        assert torch.equal(block(tokens, torch.randn(2, config.width), model.turn), tokens)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_cost_formula_equals_the_operator_count(name: str) -> None:
    config = config_of(name)
    with torch.device("meta"):
        model = MMDiT(config)
        given = {key: value.to("meta") for key, value in inputs(config).items()}
    with FlopCounterMode(display=False) as forward:
        model(**given)
    assert forward.get_total_flops() == 4 * forward_flops(config)
    with FlopCounterMode(display=False) as train:
        model(**given).sum().backward()
    # What enters the first layers needs no gradient, nor do queries of words that nobody reads.
    times = (2 if config.guidance else 1) * 256
    pooled = config.text_width if config.pool_text else 0
    first = config.tokens * config.patch**2 * config.channels + times + pooled + config.vector_width
    first += config.text_tokens * config.text_width
    assert train.get_total_flops() == 4 * (3 * forward_flops(config) - 2 * first * config.width)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("FLUX", 11_891_178_560), ("FLUX-debug", 258_286_144), ("FLUX-dev", 11_901_408_320)],
)
def test_published_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert parameter_count(MMDiT(MMDiTConfig(**LATENTS, **PUBLISHED[name]))) == parameters


@pytest.mark.parametrize(("name", "billions"), [("SD3-2B", 2.0), ("SD3-8B", 8.0)])
def test_sizes_named_after_their_billions(name: str, billions: float) -> None:
    with torch.device("meta"):
        count = parameter_count(MMDiT(MMDiTConfig(**LATENTS, **PUBLISHED[name])))
    assert count / 1e9 == pytest.approx(billions, rel=0.02)


def test_parts_of_flux_have_their_published_sizes() -> None:
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(**LATENTS, **PUBLISHED["FLUX"]))
    sizes = [parameter_count(block) for block in model.blocks]
    assert sizes == [339_831_296] * 19 + [141_591_808] * 38
    assert model.config.pairs == (8, 28, 28)


def test_the_micro_is_of_a_million() -> None:
    model = MMDiT(MMDiTConfig(**EMOJI, **PUBLISHED["MMDiT-micro/4"]))
    assert parameter_count(model) == pytest.approx(1e6, rel=0.05)


def test_patches_that_move_with_their_places_give_patches_that_moved() -> None:
    model, given = disturbed(), inputs()
    order = torch.randperm(PLAIN.tokens, generator=torch.Generator().manual_seed(3))
    out = patchify(model(**given), PLAIN.patch)

    def moved(x: Tensor) -> Tensor:
        return unpatchify(patchify(x, PLAIN.patch)[:, order], PLAIN.patch, PLAIN.image_size)

    still = patchify(model(**given | {"x": moved(given["x"])}), PLAIN.patch)
    assert not torch.allclose(still, out[:, order], atol=1e-3)
    places = torch.cat((torch.arange(PLAIN.text_tokens), PLAIN.text_tokens + order))
    model.turn.copy_(model.turn[:, places].clone())
    with_places = patchify(model(**given | {"x": moved(given["x"])}), PLAIN.patch)
    torch.testing.assert_close(with_places, out[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "flux", "sd3"])
def test_the_order_of_words_is_what_their_features_say(name: str) -> None:
    model, given = disturbed(config_of(name)), inputs(config_of(name))
    flipped = model(**given | {"text": given["text"].flip(1)})
    torch.testing.assert_close(flipped, model(**given), rtol=1e-5, atol=2e-5)


def test_padding_of_a_text_changes_nothing() -> None:
    short = disturbed()
    given = inputs()
    long = MMDiT(MMDiTConfig(**(vars(PLAIN) | {"text_tokens": 9})))
    long.load_state_dict(short.state_dict())
    long.reset_buffers()
    longer = F.pad(given["text"], (0, 0, 0, 3))
    out = long(**given | {"text": longer})
    torch.testing.assert_close(out, short(**given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Double, Single])
def test_words_behind_the_mask_do_not_reach_the_image(kind: type) -> None:
    model = disturbed()
    block = next(block for block in model.blocks if isinstance(block, kind))
    words, count = PLAIN.text_tokens, PLAIN.text_tokens + PLAIN.tokens
    tokens, condition = torch.randn(2, count, PLAIN.width), torch.randn(2, PLAIN.width)
    other = tokens.clone()
    other[:, :words] = 30.0 * torch.randn(2, words, PLAIN.width)
    mask = (torch.arange(count) >= words).expand(2, 1, 1, count)
    image, from_other = (block(x, condition, model.turn, mask)[:, words:] for x in (tokens, other))
    assert torch.equal(image, from_other)
    seen = block(tokens, condition, model.turn)[:, words:]
    assert not torch.allclose(seen, image, atol=1e-3)


def test_without_the_mask_padding_is_seen_as_flux_sees_it() -> None:
    config = config_of("flux")
    model, given = disturbed(config), inputs(config)
    assert given["text"][2].abs().max() == 0.0
    masked = MMDiT(MMDiTConfig(**(vars(config) | {"mask_text": True})))
    masked.load_state_dict(model.state_dict())
    difference = (model(**given) - masked(**given)).abs().amax(dim=(1, 2, 3))
    assert difference[0] < 1e-5 < 1e-3 < min(difference[1], difference[2])


def test_all_that_conditions_matters() -> None:
    config = config_of("conditions")
    model, given = disturbed(config), inputs(config)
    out = model(**given)
    others = {
        "t": given["t"] + 0.01,
        "label": (given["label"] + 1) % 6,
        "text": given["text"].roll(1, 0),
        "vector": given["vector"] + 1.0,
    }
    for name, value in others.items():
        assert not torch.allclose(model(**given | {name: value}), out, atol=1e-3), name
    none = torch.full_like(given["label"], config.classes)
    without = {name: value for name, value in given.items() if name != "label"}
    assert torch.equal(model(**without), model(**given | {"label": none}))


def test_networks_without_a_class_ignore_the_label() -> None:
    model, given = disturbed(), inputs()
    assert torch.equal(model(**given | {"label": given["label"] * 0}), model(**given))


def test_the_strength_of_guidance_is_told() -> None:
    config = config_of("flux")
    model, given = disturbed(config), inputs(config)
    out = model(**given)
    assert torch.equal(model(**given, guidance=torch.full((4,), 3.5)), out)
    assert not torch.allclose(model(**given, guidance=torch.full((4,), 2.0)), out, atol=1e-3)


def test_published_weights_give_our_velocity_with_the_last_layer_negated() -> None:
    """u(x, s) of noise - data at s = 1 - t is, with the other sign, the velocity data - noise at t."""
    config = config_of("flux")
    ours = disturbed(config)
    published = MMDiT(MMDiTConfig(**(vars(config) | {"time": "flow"})))
    published.load_state_dict(ours.state_dict())
    for weight in published.final.out.parameters():
        weight.data.neg_()
    given = inputs(config)
    theirs = published(**given | {"t": 1.0 - given["t"]})
    torch.testing.assert_close(ours(**given), -theirs, rtol=0.0, atol=0.0)


def test_born_on_the_meta_device_it_is_the_same_model() -> None:
    for name in ("plain", "table"):
        config = config_of(name)
        with torch.device("meta"):
            model = MMDiT(config)
        model.to_empty(device="cpu")
        for table in model.buffers():
            table.fill_(float("nan"))
        initialise(model, seed=0)
        born_here = fresh(config)
        for pair in zip(model.buffers(), born_here.buffers(), strict=True):
            assert torch.equal(*pair)
        for pair in zip(model.parameters(), born_here.parameters(), strict=True):
            assert torch.equal(*pair)
        assert model.state_dict().keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("name", ["plain", "conditions", "sd3"])
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


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"text_tokens": 0}, r"an MMDiT joins image and text tokens, and data.text is not given"),
        ({"heads": 16}, r"model.rope .* model.width / model.heads = 3, must be even"),
        ({"patch": 5}, r"data.image_size = 12 is not divisible by model.patch = 5"),
        ({"heads": 7}, r"model.width = 48 is not divisible by model.heads = 7"),
        ({"width": 30, "rope": False}, r"model.width = 30 is not divisible by 4"),
    ],
)
def test_impossible_sizes_are_refused_by_key(changes: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        MMDiTConfig(**(vars(PLAIN) | changes))


def test_what_is_missing_is_asked_for() -> None:
    given = inputs()
    with pytest.raises(UserError, match="takes a text with every sample"):
        fresh(PLAIN)(given["x"], given["t"])
    with pytest.raises(UserError, match="texts of 6 tokens and is given 4"):
        fresh(PLAIN)(**given | {"text": given["text"][:, :4]})
    with pytest.raises(UserError, match=r"model.vector_width = 9: the network takes a vector"):
        fresh(config_of("flux"))(**given)


@pytest.mark.slow
def test_compiled_blocks_are_the_same() -> None:
    model, given = disturbed(), inputs()
    out = model(**given)
    for block in model.blocks:
        block.compile(fullgraph=True)
    torch.testing.assert_close(model(**given), out, rtol=1e-5, atol=2e-5)
