"""Jet: invertible, its volume is the Jacobian's, and its couplings are those published."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flows.errors import UserError
from flows.initialise import initialise
from flows.models.jet import PUBLISHED, Jet, JetConfig, forward_flops, initial_order, put

CONFIG = JetConfig(
    image_size=8,
    channels=3,
    classes=5,
    patch=2,
    width=32,
    couplings=7,
    layers=1,
    heads=2,
    conditional=True,
    kinds=("channel", "channel", "spatial"),
    patterns=("checkerboard", "hstripes-inv", "vstripes"),
)
PATTERNS = ("checkerboard", "vstripes", "hstripes")


def with_(**changes) -> JetConfig:
    return dataclasses.replace(CONFIG, **changes)


def fresh(config: JetConfig = CONFIG) -> Jet:
    model = Jet(config)
    initialise(model, seed=0)
    return model


def disturbed(config: JetConfig = CONFIG, std: float = 0.1) -> Jet:
    model = fresh(config)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.data.normal_(0.0, std, generator=generator)
    return model


def inputs(config: JetConfig = CONFIG, batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shape = (batch, config.channels, config.image_size, config.image_size)
    x = torch.randn(shape, generator=generator)
    return x, torch.randint(0, config.classes + 1, (batch,), generator=generator)


def plain_forward(model: Jet, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The published flow written plainly: permutation matrices, convolution, explicit softmax."""
    config = model.config
    n, c, heads = config.tokens, config.features, config.heads
    x = nn.functional.unfold(x, config.patch, stride=config.patch)
    # unfold orders features (channel, row, column).
    x = x.unflatten(1, (config.channels, -1)).permute(0, 3, 2, 1).flatten(2)
    logdet = torch.zeros(len(x))
    for index, net in enumerate(model.blocks):
        channel = config.kinds[index % len(config.kinds)] == "channel"
        matrix = torch.eye(c if channel else n)[model.order(index)]
        if channel:
            x_1, x_2 = (x @ matrix.T).split(c // 2, dim=2)
        else:
            moved = torch.einsum("ij,bjc->bic", matrix, x)
            x_1, x_2 = (part.reshape(-1, n, c // 2) for part in moved.split(n // 2, dim=1))
        h = x_1 @ net.up.weight.T + net.up.bias + net.position
        if net.condition is not None:
            h = h + net.condition(model.label.weight[label])[:, None]
        for layer in net.layers:
            y = layer.attention_norm(h)
            qkv = y @ layer.attention.qkv.weight.T + layer.attention.qkv.bias
            q, k, v = (
                part.unflatten(-1, (heads, -1)).transpose(1, 2)
                for part in qkv.split(config.width, dim=-1)
            )
            scores = (q @ k.mT / math.sqrt(config.width // heads)).softmax(-1)
            h = h + layer.attention.out((scores @ v).transpose(1, 2).flatten(2))
            mlp = layer.feedforward
            y = mlp.up(layer.feedforward_norm(h))
            h = h + mlp.down(nn.functional.gelu(y, approximate="tanh"))
        shift, raw = net.out(net.norm(h)).split(c // 2, dim=2)
        x_2 = (x_2 + shift) * 2 * torch.sigmoid(raw)
        logdet = logdet + (2 * torch.sigmoid(raw)).log().sum((1, 2))
        if channel:
            x = torch.cat((x_1, x_2), dim=2) @ matrix
        else:
            both = torch.cat([part.reshape(-1, n // 2, c) for part in (x_1, x_2)], dim=1)
            x = torch.einsum("ij,bic->bjc", matrix, both)
    return x, logdet


def test_equals_the_plain_flow_in_output_and_gradient() -> None:
    model = disturbed()
    names, weights = zip(*model.named_parameters(), strict=True)
    results = []
    for forward in (model, lambda *a: plain_forward(model, *a)):
        z, logdet = forward(*inputs())[:2]
        loss = z.square().sum() - logdet.sum()
        results.append((z, logdet, torch.autograd.grad(loss, weights)))
    (z, logdet, gradients), (plain_z, plain_logdet, plain_gradients) = results
    torch.testing.assert_close(z, plain_z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logdet, plain_logdet, rtol=1e-5, atol=1e-4)
    for name, gradient, plain in zip(names, gradients, plain_gradients, strict=True):
        plain = plain.clone()
        if name.endswith("qkv.bias"):
            key = slice(CONFIG.width, 2 * CONFIG.width)
            assert torch.equal(gradient[key], torch.zeros(CONFIG.width))
            plain[key] = 0.0
        error = (gradient - plain).norm() / plain.norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def test_the_inverse_undoes_the_flow() -> None:
    model = disturbed(std=0.2)
    x, label = inputs()
    z = model(x, label).z
    assert (z - model(x, (label + 1) % 6).z).abs().max() > 0.1
    assert (model.inverse(z, label) - x).abs().max() <= 1e-5
    again = model(model.inverse(z, label), label).z
    assert (again - z).abs().max() <= 1e-5


@pytest.mark.parametrize("kinds", [("channel",), ("spatial",), ("channel", "spatial")])
def test_the_volume_is_that_of_the_jacobian(kinds) -> None:
    config = with_(image_size=4, kinds=kinds)
    model = disturbed(config, std=0.3)
    x, label = inputs(config, batch=1)
    dimensions = x.numel()
    forward = torch.autograd.functional.jacobian(lambda y: model(y, label).z, x)
    square = forward.reshape(dimensions, dimensions).double()
    sign, expected = torch.linalg.slogdet(square)
    output = model(x, label)
    assert sign == 1
    assert abs(output.logdet.item()) > 0.1
    assert abs(output.logdet.item() - expected.item()) <= 1e-5 * dimensions
    back = torch.autograd.functional.jacobian(lambda z: model.inverse(z, label), output.z)
    undone = torch.linalg.slogdet(back.reshape(dimensions, dimensions).double())[1]
    assert abs(output.logdet.item() + undone.item()) <= 1e-5 * dimensions


def test_a_fresh_flow_is_the_identity_exactly() -> None:
    model = fresh()
    x, label = inputs()
    output = model(x, label)
    assert torch.equal(output.logdet, torch.zeros(4))
    image = x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).permute(0, 2, 4, 3, 5, 1)
    assert torch.equal(output.z, image.reshape(4, 16, 12))
    assert torch.equal(model.inverse(output.z, label), x)
    # The input and every coupling's output but the last: seven times the same.
    torch.testing.assert_close(output.power, 7 * x.square().mean((1, 2, 3)))


def test_power_sums_what_the_couplings_pass_on() -> None:
    config = with_(couplings=3)
    model = disturbed(config)
    x, label = inputs(config)
    expected = x.square().mean((1, 2, 3))
    for couplings in (1, 2):
        part = Jet(with_(couplings=couplings))
        part.load_state_dict(model.state_dict(), strict=False)
        expected = expected + part(x, label).z.square().mean((1, 2))
    torch.testing.assert_close(model(x, label).power, expected)


def test_a_coupling_changes_one_half_and_reads_the_other() -> None:
    for kind in ("channel", "spatial"):
        model = disturbed(with_(couplings=1, kinds=(kind,)))
        x, label = inputs(batch=1)
        jacobian = torch.autograd.functional.jacobian(lambda y, m=model, c=label: m(y, c).z, x)
        jacobian = jacobian.reshape(16, 12, 3, 4, 2, 4, 2).permute(0, 1, 3, 5, 4, 6, 2)
        jacobian = jacobian.reshape(16, 12, 16, 12)
        order = model.order(0)
        axis = 1 if kind == "channel" else 0
        first, second = order.chunk(2)
        kept = jacobian.index_select(axis, first).flatten(2).flatten(0, 1)
        identity = torch.eye(192).view(16, 12, 192).index_select(axis, first).flatten(0, 1)
        assert torch.equal(kept, identity)
        changed = jacobian.index_select(axis, second).index_select(axis + 2, second)
        changed = changed.reshape(96, 96)
        assert torch.equal(changed, changed.diagonal().diag())
        assert jacobian.index_select(axis, second).index_select(axis + 2, first).abs().max() > 1e-3


def test_spatial_couplings_take_the_tokens_of_their_pattern() -> None:
    config = with_(kinds=("spatial",), couplings=6, image_size=8, patterns=PATTERNS)
    rows = torch.arange(16) // 4
    columns = torch.arange(16) % 4
    expected = {"checkerboard": rows + columns, "vstripes": columns, "hstripes": rows}
    for index, name in enumerate((*PATTERNS, *PATTERNS)):
        assert config.coupling(index) == ("spatial", name)
        first, second = initial_order(config, index).chunk(2)
        assert first.tolist() == [i for i in range(16) if expected[name][i] % 2 == 0]
        assert second.tolist() == [i for i in range(16) if expected[name][i] % 2 == 1]
        other = with_(kinds=("spatial",), couplings=6, patterns=(f"{name}-inv",))
        assert torch.equal(initial_order(other, 0), torch.cat((second, first)))


def test_channel_couplings_have_an_order_each_the_same_in_every_model() -> None:
    orders = [initial_order(with_(couplings=40, kinds=("channel",)), i) for i in range(40)]
    assert all(torch.equal(order.sort().values, torch.arange(12)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 40
    # In checkpoints' terms: drawn once and for ever.
    assert orders[0].tolist() == fresh(with_(kinds=("channel",))).order(0).tolist()
    # Each feature is among the changed half about as often as not: 40 halves, 4 standard errors.
    often = torch.zeros(12)
    for order in orders:
        often[order[6:]] += 1
    assert (often - 20).abs().max() <= 4 * (40 / 4) ** 0.5


def test_kinds_and_patterns_take_turns() -> None:
    config = with_(couplings=7, patterns=("checkerboard", "vstripes-inv"))
    assert [config.coupling(i)[0] for i in range(7)] == [
        *("channel", "channel", "spatial"),
        *("channel", "channel", "spatial"),
        "channel",
    ]
    assert config.coupling(2)[1] == "checkerboard"
    assert config.coupling(5)[1] == "vstripes-inv"


def test_published_orders_can_be_loaded() -> None:
    model, other = fresh(), disturbed()
    generator = torch.Generator().manual_seed(3)
    state = other.state_dict()
    for index in range(CONFIG.couplings):
        name = f"order_{index}"
        state[name] = torch.randperm(len(state[name]), generator=generator)
    model.load_state_dict(state)
    x, label = inputs()
    z = model(x, label).z
    torch.testing.assert_close(z, plain_forward(model, x, label)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(z, other(x, label).z, atol=0.1)
    assert (model.inverse(z, label) - x).abs().max() <= 1e-5


def test_moving_to_places_has_the_gradient_of_moving_back() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    place = torch.tensor([3, 0, 4, 1, 2])
    moved = put(x, 1, place)
    for i, target in enumerate(place):
        assert torch.equal(moved[:, target], x[:, i])
    assert torch.autograd.gradcheck(lambda y: put(y, 1, place), (x,))
    assert torch.autograd.gradgradcheck(lambda y: put(y, 1, place).square(), (x,))


@pytest.mark.parametrize(
    ("name", "parameters", "orders"),
    [("Jet-32x2", 207_177_216, 2_170_880), ("Jet-64x5", 1_019_612_160, 4_341_760)],
)
def test_published_sizes(name: str, parameters: int, orders: int) -> None:
    with torch.device("meta"):
        model = Jet(JetConfig(image_size=64, channels=3, classes=1000, **PUBLISHED[name]))
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    # The published count of frozen numbers holds both kinds of matrix for every coupling.
    frozen = model.config.couplings * (model.config.features**2 + model.config.tokens**2)
    assert frozen == orders


@pytest.mark.parametrize("conditional", [False, True])
def test_the_cost_formula_equals_the_operator_count(conditional: bool) -> None:
    config = with_(conditional=conditional)
    with torch.device("meta"):
        model = Jet(config)
        x, label = torch.empty(4, 3, 8, 8), torch.empty(4, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        z = model(x, label).z
    assert counter.get_total_flops() / 4 == forward_flops(config)
    # Going back costs what going forth does.
    with FlopCounterMode(display=False) as counter:
        model.inverse(z, label)
    assert counter.get_total_flops() / 4 == forward_flops(config)


def test_without_a_condition_labels_say_nothing() -> None:
    config = with_(conditional=False)
    model = disturbed(config)
    x, label = inputs(config)
    assert torch.equal(model(x, label).z, model(x).z)
    assert not any("label" in name or "condition" in name for name, _ in model.named_parameters())
    told = disturbed()
    none = torch.full_like(label, CONFIG.classes)
    assert torch.equal(told(x).z, told(x, none).z)


def test_initial_weights() -> None:
    config = with_(width=128, heads=4, couplings=2, image_size=16)
    for name, weight in fresh(config).named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.full_like(weight, float("weight" in name))), name
        elif name.endswith("bias") or name.split(".")[-2:] == ["out", "weight"]:
            zero = name.endswith("bias") or "attention" not in name
            assert bool(weight.any()) != zero, name
        elif name.endswith("position"):
            assert weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
        elif name.startswith("label"):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        elif name.endswith("qkv.weight"):
            assert weight.abs().max().item() == pytest.approx((6 / 256) ** 0.5, rel=0.01)
        elif name.endswith("0.up.weight") or name.endswith("1.up.weight"):
            assert weight.std().item() == pytest.approx(6**-0.5, rel=0.1)


def test_born_on_the_meta_device_it_is_the_same_model() -> None:
    with torch.device("meta"):
        model = Jet(CONFIG)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    initialise(model, seed=0)
    for (name, value), other in zip(
        model.state_dict().items(), fresh().state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_in_bfloat16_the_map_is_still_invertible_and_its_volume_float32() -> None:
    model = disturbed()
    gathered = copy.deepcopy(model)
    for weight in gathered.parameters():
        weight.data = weight.data.bfloat16()
    x, label = inputs()
    exact = model(x, label)
    with torch.autocast("cpu", torch.bfloat16):
        cast, precast = model(x, label), gathered(x, label)
        back = model.inverse(cast.z, label)
    assert {value.dtype for value in cast} == {torch.float32}
    for one, other in zip(cast, precast, strict=True):
        assert torch.equal(one, other)
    # The networks are those of bfloat16 both ways; the couplings are float32.
    assert (back - x).abs().max() <= 1e-5
    assert 0.0 < (cast.z - exact.z).norm() / exact.z.norm() < 0.03


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"patch": 3}, r"data.image_size = 8 is not divisible by model.patch = 3"),
        ({"heads": 3}, r"model.width = 32 is not divisible by model.heads = 3"),
        ({"patch": 1}, r"model.patch = 1 makes tokens of 3 numbers"),
        ({"patch": 8}, r"cuts data.image_size = 8 into 1 x 1 tokens"),
        ({"kinds": ()}, r"model.kinds names no kind"),
        ({"patterns": ()}, r"model.patterns is empty"),
    ],
)
def test_impossible_sizes_are_refused_by_key(changes, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        with_(**changes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu() -> None:
    model = disturbed()
    x, label = inputs()
    expected = model(x, label)
    model.cuda()
    output = model(x.cuda(), label.cuda())
    torch.testing.assert_close(output.z.cpu(), expected.z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.logdet.cpu(), expected.logdet, rtol=1e-3, atol=1e-2)
    back = model.inverse(output.z, label.cuda())
    assert (back.cpu() - x).abs().max() <= 1e-4
