"""Every way to invert a flow gives the same samples, and guidance is what its equations say."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flows.errors import UserError
from flows.samplers.inversion import SEQUENTIAL, Guess, Strategy, Told, invert, prior, solve
from flows.samplers.inversion_guidance import NO_GUIDANCE, FlowGuidance, guide
from tests.flows.test_autoregressive_flows import (
    CONFIGS,
    RICH,
    STARFLOW,
    TARFLOW,
    blocks_of,
    disturbed,
    inputs,
    read_at_once,
)

LINEAR = FlowGuidance(1.5, "linear", "both", annealed=False, temperature=1.0)
ANNEALED = replace(LINEAR, annealed=True)
DISTRIBUTION = replace(LINEAR, form="distribution")
TEMPERATURE = replace(LINEAR, temperature=0.7)


def told(
    model, batch: int, label: Tensor | None, text: Tensor | None, guidance=NO_GUIDANCE
) -> Told:
    device = torch.device("cpu")
    null = model.condition(None, None, batch, device)
    return Told(model.condition(label, text, batch, device), null, guidance)


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def flow(request: pytest.FixtureRequest):
    config = CONFIGS[request.param]
    given = inputs(config)
    x = given.pop("x")
    return disturbed(config), x, given


def test_inverting_gives_back_the_data(flow) -> None:
    model, x, given = flow
    z = model(x, **given).z
    for strategy in (SEQUENTIAL, Strategy(4), Strategy(100), Strategy(5, sliding=True)):
        back = invert(model, z, **given, strategy=strategy)
        assert (back.x - x).abs().max() <= 1e-5
    again = model(back.x, **given)
    torch.testing.assert_close(again.z, z, atol=1e-5, rtol=1e-5)


def test_the_cache_changes_nothing(flow) -> None:
    """A step of the cached chain predicts what the network predicts from the whole sequence."""
    model, x, given = flow
    known = told(model, 3, given.get("label"), given.get("text"))
    for block in blocks_of(model):
        v = block.inputs(block.ordered(model.tokens(x)))
        whole = read_at_once(block, v, known.condition)
        cache = block.open(known.condition, 3, None)
        pieces = [block.predict(part, cache) for part in v.split([1, 1, 4, 1, v.shape[1] - 7], 1)]
        for one, parts in zip(whole, zip(*pieces, strict=True), strict=True):
            if one is not None:
                torch.testing.assert_close(torch.cat(parts, 1), one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("guidance", [NO_GUIDANCE, LINEAR, ANNEALED, DISTRIBUTION, TEMPERATURE])
def test_all_iterations_are_sequential_sampling(guidance: FlowGuidance) -> None:
    for config in (TARFLOW, STARFLOW):
        model, given = disturbed(config), inputs(config)
        del given["x"]
        z = prior(model, 0, torch.arange(3))
        chain = blocks_of(model)[0].shape.chain
        exact = invert(model, z, **given, guidance=guidance)
        for strategy in (
            Strategy(chain, chain),
            Strategy(4, 4),
            Strategy(4, 4, guess="zero"),
            Strategy(5, sliding=True),
        ):
            found = invert(model, z, **given, guidance=guidance, strategy=strategy)
            torch.testing.assert_close(found.x, exact.x, atol=1e-5, rtol=1e-5)
            assert found.network_calls <= exact.network_calls


def test_k_jacobi_iterations_leave_k_tokens_exact(flow) -> None:
    model, _, given = flow
    block = blocks_of(model)[0]
    w = torch.randn(3, block.shape.tokens, block.shape.features)
    known = told(model, 3, given.get("label"), given.get("text"))
    with torch.inference_mode():
        exact, _ = solve(block, w, known, SEQUENTIAL, tolerance=0.0, clamp=None)
        unchanged = block.shape.tokens - block.shape.chain
        for k in (1, 2, 5):
            strategy = Strategy(block.shape.chain, k, guess="zero")
            found, calls = solve(block, w, known, strategy, tolerance=0.0, clamp=None)
            error = block.ordered(found - exact).abs().amax((0, 2))
            assert calls == k
            assert error[: k + unchanged].max() <= 1e-5
            assert k > 1 or error[k + unchanged :].max() > 1e-4


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("guess", ["prior", "zero"])
@pytest.mark.parametrize("group", [4, 100])
def test_tokens_that_overflow_before_they_settle_break_none_before_them(
    group: int, guess: Guess, sliding: bool
) -> None:
    """Scales so steep that what follows from a wrong token is beyond all numbers."""
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    x = given.pop("x")
    with torch.no_grad():
        for block in blocks_of(model):
            block.project_out.weight *= 4
    z = model(x, **given).z.detach()
    strategy = Strategy(group, guess=guess, sliding=sliding)
    found = invert(model, z, **given, strategy=strategy).x
    # Rounding is multiplied by the same scales, in sequential sampling too.
    assert (found - x).abs().max() <= 1e-4


def test_settled_tokens_end_the_iteration_within_the_tolerance() -> None:
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    z = prior(model, 0, torch.arange(3))
    exact = invert(model, z, given["label"])
    loose = invert(model, z, given["label"], strategy=Strategy(15), tolerance=1e-3)
    tight = invert(model, z, given["label"], strategy=Strategy(15), tolerance=1e-6)
    assert loose.network_calls < tight.network_calls < exact.network_calls == 15
    assert (loose.x - exact.x).abs().max() < 5e-3
    assert (tight.x - exact.x).abs().max() < 1e-5


def test_a_sliding_group_with_a_cap_moves_on_at_least_that_fast() -> None:
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    z = prior(model, 0, torch.arange(3))
    capped = invert(model, z, given["label"], strategy=Strategy(6, 2, sliding=True))
    assert max(capped.calls) <= 5


def test_the_clamp_bounds_iterates_and_is_off_unless_asked_for() -> None:
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    z = prior(model, 0, torch.arange(3)) * 3
    one = [Strategy(15, 3), SEQUENTIAL, SEQUENTIAL]
    free, clamped = (
        invert(model, z, given["label"], strategy=one, clamp=clamp).x for clamp in (None, 0.5)
    )
    assert not torch.allclose(free, clamped, atol=1e-2)
    all_clamped = invert(model, z, given["label"], strategy=Strategy(15, 3), clamp=0.5)
    # The first token of the last block is not iterated.
    assert all_clamped.x[:, :, 2:].abs().max() <= 0.5


def test_calls_are_weighed_by_depth_and_guided_ones_count_twice() -> None:
    model, given = disturbed(STARFLOW), inputs(STARFLOW)
    z = prior(model, 0, torch.arange(3))
    plain = invert(model, z, text=given["text"])
    assert plain.calls == (16, 16, 16)
    assert plain.network_calls == 16
    guided = invert(model, z, text=given["text"], guidance=LINEAR)
    assert guided.calls == (32, 16, 16)
    assert guided.network_calls == pytest.approx((32 * 2 + 16 + 16) / 4)
    heated = invert(model, z, text=given["text"], guidance=TEMPERATURE)
    assert heated.calls == (32, 32, 32)


def test_no_weight_is_no_guidance_and_no_label_has_nothing_to_be_led_from() -> None:
    for config in (TARFLOW, STARFLOW, RICH):
        model, given = disturbed(config), inputs(config)
        del given["x"]
        z = prior(model, 0, torch.arange(3))
        plain = invert(model, z, **given)
        unguided = invert(model, z, **given, guidance=replace(LINEAR, weight=0.0))
        assert torch.equal(plain.x, unguided.x)
        moved = invert(model, z, **given, guidance=LINEAR)
        assert (moved.x - plain.x).abs().max() > 1e-3
        none = invert(model, z)
        for guidance in (LINEAR, DISTRIBUTION):
            led = invert(model, z, guidance=guidance)
            torch.testing.assert_close(led.x, none.x, atol=1e-5, rtol=1e-5)


def test_guided_inversion_equals_two_separate_networks() -> None:
    """Written plainly, without a cache: one network with the labels, one without."""
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    z = prior(model, 0, torch.arange(3))
    for guidance in (
        LINEAR,
        ANNEALED,
        replace(LINEAR, parts="scale"),
        replace(LINEAR, parts="shift"),
    ):
        u = z
        for block in reversed(blocks_of(model)):
            w = block.ordered(u)
            u = w.clone()
            for j in range(15):
                none = torch.full((3,), 5)
                a, m = (part[:, j] for part in read_at_once(block, u[:, :15], given["label"]))
                a0, m0 = (part[:, j] for part in read_at_once(block, u[:, :15], none))
                weight = 1.5 * (j + 1) / 15 if guidance.annealed else 1.5
                a = a + weight * (a - a0) if guidance.parts != "shift" else a
                m = m + weight * (m - m0) if guidance.parts != "scale" else m
                u[:, j + 1] = w[:, j + 1] * a.exp() + m
            u = block.ordered(u)
        found = invert(model, z, given["label"], guidance=guidance)
        torch.testing.assert_close(found.x, model.image(u), atol=1e-5, rtol=1e-5)


def test_temperature_divides_the_logits_of_the_unconditional_network_alone() -> None:
    config = replace(TARFLOW, conditional=False)
    model = disturbed(config)
    block = blocks_of(model)[0]
    hot = disturbed(config)
    for layer in blocks_of(hot)[0].layers:
        layer.attention.inner.qkv.weight.data[:32] /= 0.7
        layer.attention.inner.qkv.bias.data[:32] /= 0.7
    v = torch.randn(2, 15, 12)
    sharpness = torch.ones(4, 1, 1, 1)
    sharpness[2:] = 1 / 0.7
    both = block.predict(torch.cat((v, v)), block.open(None, 4, sharpness))
    plain = block.predict(v, block.open(None, 2, None))
    heated = blocks_of(hot)[0].predict(v, block.open(None, 2, None))
    for found, first, second in zip(both, plain, heated, strict=True):
        torch.testing.assert_close(found, torch.cat((first, second)), atol=1e-5, rtol=1e-5)


def _gaussian(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    return -0.5 * ((x - mean) * (-log_scale).exp()).square() - log_scale


def test_guidance_of_the_distribution_is_a_product_of_gaussians() -> None:
    generator = torch.Generator().manual_seed(3)
    a, m = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    a = -a.abs()
    a[1] = 0.0  # without a condition: sigma = 1, larger than each with
    w = 1.5
    weight = torch.full((3, 1), w, dtype=torch.float64)
    log_scale, shift = guide(a, m, weight, how=DISTRIBUTION, scale="softplus")
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)[:, None, None]
    product = (1 + w) * _gaussian(x, m[0], a[0]) - w * _gaussian(x, m[1], a[1])
    found = _gaussian(x, shift[0], log_scale[0])
    constant = product - found
    torch.testing.assert_close(constant, constant[:1].expand_as(constant), atol=1e-10, rtol=0)


def test_guidance_of_the_distribution_at_its_limits() -> None:
    weight = torch.full((3, 1), 2.0)
    m, a = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    same, _ = guide(torch.cat((a, a)), m, weight, how=DISTRIBUTION, scale="softplus")
    torch.testing.assert_close(same, a)
    wider = torch.cat((a + 3.0, a))
    log_scale, shift = guide(wider, m, weight, how=DISTRIBUTION, scale="softplus")
    assert log_scale.isfinite().all()
    torch.testing.assert_close(log_scale, a + 3.0)  # clipped: the ratio of scales counts as 1
    torch.testing.assert_close(shift, m[:1] + 2.0 * (m[:1] - m[1:]))
    none = guide(wider, m, torch.zeros(3, 1), how=DISTRIBUTION, scale="softplus")
    assert torch.equal(none[0], wider[:1])
    assert torch.equal(none[1], m[:1])


def test_linear_guidance_of_a_softplus_scale_moves_the_scale_itself_and_stops_at_zero() -> None:
    scales = torch.tensor([[[2.0, 1.0]], [[1.5, 4.0]]])
    log_scale, _ = guide(scales.log(), scales, torch.ones(1, 1), how=LINEAR, scale="softplus")
    torch.testing.assert_close(log_scale.exp(), torch.tensor([[[2.5, 0.0]]]))


def test_noise_belongs_to_the_sample_and_takes_the_priors_variance() -> None:
    model = disturbed(TARFLOW)
    z = prior(model, 0, torch.arange(4))
    assert torch.equal(z[2:], prior(model, 0, torch.arange(2, 4)))
    variance = torch.rand(16, 12)
    torch.testing.assert_close(prior(model, 0, torch.arange(4), variance), z * variance.sqrt())


def test_samples_can_be_part_of_a_gradient() -> None:
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    x = invert(model, prior(model, 0, torch.arange(3)), given["label"]).x
    x.requires_grad_()
    model(x, given["label"]).logdet.sum().backward()
    assert x.grad.abs().max() > 0


def test_strategies_that_solve_nothing_are_refused() -> None:
    for group, iterations in ((0, None), (4, 0)):
        with pytest.raises(UserError, match="strategy"):
            Strategy(group, iterations)
    model = disturbed(TARFLOW)
    with pytest.raises(UserError, match="2 strategies are given for a flow of 3 blocks"):
        invert(model, prior(model, 0, torch.arange(1)), strategy=[SEQUENTIAL] * 2)
    with pytest.raises(ValueError, match="together"):
        replace(DISTRIBUTION, parts="shift")


def test_a_sample_does_not_depend_on_how_many_are_drawn_with_it() -> None:
    """Products of a few rows are computed in another form."""
    for config in (TARFLOW, RICH):
        model = disturbed(config)
        label = torch.arange(70) % 5
        z = prior(model, 0, torch.arange(70))
        together = invert(model, z, label).x
        for batch in (1, 12, 20, 63):
            few = invert(model, z[:batch], label[:batch]).x
            torch.testing.assert_close(few, together[:batch], atol=1e-5, rtol=1e-5)
