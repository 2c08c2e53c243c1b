"""DiT-MoE: published sizes, costs, and a network whose options change what they say and nothing else."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flows.errors import UserError
from flows.initialise import initialise
from flows.models.dit_moe import DiTMoE, active_parameters, forward_flops
from flows.models.dit_moe_config import DiTMoEConfig
from flows.models.dit_moe_sizes import PUBLISHED
from flows.models.family import architecture
from flows.models.grouped import grouped_product
from flows.models.zoo import DIT_MOE, family_of
from flows.routed import Mixed

# name: parameters with the position table, millions that a token meets
COUNTS = {
    "S/2-8E2A": (199_307_552, 71.8),
    "S/2-16E2A": (369_213_728, 71.8),
    "B/2-8E2A": (795_861_536, 286.1),
    "B/2-16E2A": (1_475_412_512, None),
    "L/2-8E2A": (2_823_764_000, None),
    "L/2-16E2A": (5_239_879_712, None),
    "XL/2-8E2A": (4_168_164_128, 1492),
    "XL/2-16E2A": (7_735_677_728, None),
    "G/2-8E2A": (8_890_604_832, None),
    "G/2-16E2A": (16_503_717_152, 3181),
}
LATENTS = {"image_size": 32, "channels": 4, "classes": 1000, "text_width": 0, "text_tokens": 0}
TINY = {
    "image_size": 8, "channels": 1, "classes": 3, "patch": 4, "width": 16, "depth": 2, "heads": 2,
    "experts": 4,
}  # fmt: skip


def tiny(**changes) -> DiTMoE:
    model = DiTMoE(DiTMoEConfig(**TINY | changes))
    initialise(model, 0)
    return model


def stirred(**changes) -> DiTMoE:
    """With weights that are nowhere zero."""
    model = tiny(**changes)
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        nn.init.normal_(weight, 0.0, 0.1, generator=generator)
    return model


def inputs(batch: int = 3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 4


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameters_and_those_that_a_token_meets(name: str) -> None:
    total, active = COUNTS[name]
    sizes = architecture(family_of(f"DiT-MoE-{name}"), f"DiT-MoE-{name}", {}, LATENTS).config
    with torch.device("meta"):
        model = DiTMoE(sizes)
    assert sum(p.numel() for p in model.parameters()) + model.position.numel() == total
    if active is not None:
        digits = 1 if active < 1000 else 0
        assert round(active_parameters(sizes) / 1e6, digits) == active


def test_every_published_name_is_of_the_family() -> None:
    assert all(family_of(name) is DIT_MOE for name in PUBLISHED)


@pytest.mark.parametrize("changes", [{}, {"recurrent": 8}, {"shared_hidden": 0, "chosen": 1}])
def test_the_cost_formula_equals_the_operator_count(changes) -> None:
    model = stirred(**changes).eval()
    config = model.config
    counter = FlopCounterMode(display=False)
    # Of the fused attention on CPU there is no formula either.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*inputs())
    assert counter.get_total_flops() / 3 == forward_flops(config)


def test_gradients_of_grouped_products_cost_twice_the_products() -> None:
    rows, groups = torch.ones(6, 8, requires_grad=True), torch.ones(3, 8, 16, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        grouped_product(rows, groups, torch.tensor([1, 4, 6], dtype=torch.int32)).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 6 * 8 * 16)


def test_a_fresh_network_is_zero_and_a_stirred_one_is_not() -> None:
    assert not tiny().eval()(*inputs()).any()
    assert stirred().eval()(*inputs()).std() > 1e-3


@pytest.mark.parametrize(
    "changes", [{}, {"recurrent": 8}, {"chooser": "experts"}, {"capacity": 1.0}]
)
def test_training_predicts_what_evaluation_predicts_and_tells_of_its_routing(changes) -> None:
    model = stirred(**changes)
    trained = model.train()(*inputs())
    assert isinstance(trained, Mixed)
    assert torch.equal(trained.prediction, model.eval()(*inputs()))
    config = model.config
    assert trained.routed.load.shape == (3, config.depth, config.experts)
    assert trained.penalty.shape == (3,)
    assert torch.equal(trained.routed.load.sum(-1), torch.full((3, 2), 2.0 * config.tokens))


def test_one_expert_alone_is_a_dense_network() -> None:
    """k = E = 1: its weight is one, so that the mixture is its expert plus the shared network."""
    model = stirred(experts=1, chosen=1).eval()
    mixture = model.blocks[0].mixture
    h = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(3))
    gate, value = (h @ mixture.experts.up[0].T).chunk(2, -1)
    dense = (nn.functional.silu(gate) * value) @ mixture.experts.down[0].T
    assert torch.allclose(mixture(h)[0], dense + mixture.shared(h), atol=1e-6)


def test_masked_outputs_leave_the_shared_network() -> None:
    model = stirred()
    config, (x, t, label) = model.config, inputs()
    ones = torch.ones(3, config.depth, config.tokens, config.slots)
    plain = model(x, t, label).prediction
    assert torch.equal(model(x, t, label, ones).prediction, plain)
    nothing = model(x, t, label, 0 * ones).prediction
    assert torch.equal(model.eval()(x, t, label, 0 * ones), plain)
    with torch.no_grad():
        for block in model.blocks:
            block.mixture.experts.down.zero_()
    assert torch.allclose(model(x, t, label), nothing, atol=1e-6)


def test_recurrent_routers_hear_of_the_layer_before() -> None:
    model = stirred(recurrent=8).eval()
    heard = []
    for block in model.blocks:
        block.mixture.router.register_forward_hook(lambda *call: heard.append(call[2].state))
    x, t, label = inputs()
    model(x, t, label)
    with torch.no_grad():
        model.blocks[0].mixture.router.inward.weight.add_(1.0)
    first, second = heard
    model(x, t, label)
    assert not torch.equal(heard[2], first)
    assert not torch.equal(heard[3], second)


def test_bfloat16_routes_in_float32() -> None:
    model = stirred()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*inputs())
    exact = model(*inputs())
    assert mixed.penalty.dtype == torch.float32
    assert (mixed.prediction - exact.prediction).abs().max() < 0.05 * exact.prediction.abs().max()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chosen": 5}, r"model.chosen = 5 is more than model.experts = 4; a token goes to at most 4"),
        ({"width": 20}, r"model.width = 20 is not a multiple of 8, .*use 24"),
        ({"expert_hidden": 12}, r"model.expert_hidden = 12 is not a multiple of 8, .*use 16"),
        ({"mask_outputs": 1.0}, r"model.mask_outputs = 1 is no share below 1"),
        ({"capacity": -1.0}, r"model.capacity = -1 is below 0"),
        ({"capacity": 1e308}, r"capacity = 1e\+308 is above model.experts / model.chosen = 2.* use 0"),
        ({"capacity": 2.5, "chooser": "experts"}, r"capacity = 2.5 is above .* 2, .* use no more"),
        ({"gate_scale": 0.0}, r"model.gate_scale = 0 is not above 0"),
        ({"chooser": "experts", "bias_rate": 0.001}, r"set model.bias_rate=0"),
    ],
)  # fmt: skip
def test_shapes_that_cannot_be_are_refused(changes, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        DiTMoEConfig(**TINY | changes)


@pytest.mark.parametrize("changes", [{}, {"recurrent": 8, "z_weight": 0.1}])
def test_link_by_link_it_computes_the_same(changes) -> None:
    """Outputs, what routers did, and gradients."""
    model = stirred(**changes)
    x, t, label = inputs()
    config = model.config
    mask = torch.rand(3, config.depth, config.tokens, config.slots, generator=torch.Generator())
    given = {"t": t, "label": label, "mask": mask}
    found = []
    for whole in (True, False):
        model.zero_grad()
        out = model(x, **given) if whole else model.chain().run(x, given)
        (out.prediction.square().sum() + out.penalty.sum()).backward()
        found.append((out, [weight.grad.clone() for weight in model.parameters()]))
    (one, ours), (other, theirs) = found
    assert torch.equal(one.prediction, other.prediction)
    assert torch.allclose(one.penalty, other.penalty)
    assert all(torch.equal(a, b) for a, b in zip(one.routed, other.routed, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    model.eval()
    assert torch.equal(model.chain().run(x, given), model(x, **given))
    links = model.chain().links
    held = [prefix for link in links for prefix in link.holds] + list(model.chain().tells)
    assert all(name.startswith(tuple(held)) for name, _ in model.named_parameters())


@pytest.mark.parametrize("changes", [{}, {"chooser": "experts"}, {"expert": "gelu"}])
def test_shapes_are_known_without_memory(changes) -> None:
    """In float32, which torch's own description of grouped products refuses."""
    with FakeTensorMode():
        model = DiTMoE(DiTMoEConfig(**TINY | changes))
        x, t, label = torch.empty(3, 1, 8, 8), torch.empty(3), torch.zeros(3, dtype=torch.int64)
        out = model(x, t, label)
        (out.prediction.sum() + out.penalty.sum()).backward()
    assert out.prediction.shape == x.shape
    assert out.routed.load.shape == (3, 2, 4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"capacity": 1.0, "recurrent": 8, "bias_rate": 0.001}])
def test_compiled_blocks_compute_the_same(changes) -> None:
    """Whole blocks, as one graph each; forward and gradients."""
    found = []
    for compiled in (False, True):
        model = stirred(**changes)
        for block in model.blocks if compiled else []:
            block.compile(fullgraph=True)
        out = model(*inputs())
        (out.prediction.square().sum() + out.penalty.sum()).backward()
        found.append([out.prediction.detach(), *(weight.grad for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5 * max(1.0, float(one.abs().max())))
