"""Samplers carry noise to the data's distribution, each sample on its own."""

import math
from itertools import pairwise

import pytest
import torch

from flows.errors import UserError
from flows.paths import GVP, LINEAR, PATHS
from flows.samplers.sampler import Solver, check_settings, explicit_grid, time_grid
from tests.flows.gaussian import MEAN, STD, GaussianVelocity, draw

FIXED: list[Solver] = ["euler", "heun", "midpoint", "rk4", "pseudo_corrector", "sde", "sde_heun"]


@pytest.mark.parametrize("solver", FIXED)
def test_a_sample_does_not_depend_on_its_batch(solver: Solver) -> None:
    label = torch.arange(12) % 3
    whole = draw(GVP, solver=solver, samples=torch.arange(12), label=label, guidance=2.0)
    order = torch.tensor([5, 11, 2])
    part = draw(GVP, solver=solver, samples=order, label=label[order], guidance=2.0)
    assert torch.equal(part.sample, whole.sample[order])
    other_seed = draw(GVP, solver=solver, samples=order, label=label[order], guidance=2.0, seed=4)
    assert not torch.allclose(part.sample, other_seed.sample)


def test_guidance_moves_samples_away_from_the_null_label() -> None:
    # Labels only shift the mean, and the null label 7 lies above; the solution is linear in it.
    plain, guided = draw(LINEAR, steps=50), draw(LINEAR, steps=50, guidance=3.0)
    torch.testing.assert_close(guided.sample, plain.sample - 2.0 * 7.0, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize(
    ("solver", "calls", "early"),
    [
        ("euler", 10, 5),
        ("heun", 20, 9),
        ("midpoint", 20, 10),
        ("rk4", 40, 19),
        ("pseudo_corrector", 11, 5),
        ("sde", 10, 5),
        ("sde_heun", 19, 9),
    ],
)
def test_network_calls_are_counted_for_each_sample(solver: Solver, calls: int, early: int) -> None:
    """`early` evaluations are at t < 1/2."""
    plain = draw(LINEAR, solver=solver, steps=10)
    guided = draw(LINEAR, solver=solver, steps=10, guidance=2.0)
    half = draw(LINEAR, solver=solver, steps=10, guidance=2.0, guidance_high=0.5)
    found = [result.network_calls.tolist() for result in (plain, guided, half)]
    assert found == [[calls] * 4, [2 * calls] * 4, [calls + early] * 4]


@pytest.mark.parametrize("solver", [*FIXED, "dopri5"])
@pytest.mark.parametrize("prediction", ["data", "noise"])
def test_no_prediction_is_asked_where_it_implies_no_velocity(
    solver: Solver, prediction: str
) -> None:
    for path in PATHS.values():
        velocity = GaussianVelocity(path)
        result = draw(path, velocity, solver=solver, prediction=prediction, steps=4)
        support = path.support(prediction, sampling=True)
        # Times reach the network in float32.
        assert support.low - 1e-7 <= min(velocity.times), path.name
        assert max(velocity.times) <= support.high + 1e-7, path.name
        assert result.sample.isfinite().all(), path.name


def test_the_time_grid_is_uniform_in_the_unshifted_time() -> None:
    assert time_grid(4, 0.0, 1.0, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    shifted = time_grid(4, 0.0, 1.0, 0.3)
    assert shifted[0] == 0.0
    assert shifted[-1] == 1.0
    gaps = [end - start for start, end in pairwise(shifted)]
    assert gaps == sorted(gaps), "a shift below 1 takes smaller steps near the noise"
    for t, u in zip(shifted[1:-1], (0.25, 0.5, 0.75), strict=True):
        logit = math.log(t / (1 - t)) - math.log(u / (1 - u))
        assert logit == pytest.approx(math.log(0.3))
    assert time_grid(2, 1e-3, 1 - 1e-3, 0.3)[0] == 1e-3


def test_a_shifted_grid_reaches_the_same_distribution() -> None:
    for solver in ("heun", "sde"):
        shape = (4000,)
        drawn = draw(LINEAR, solver=solver, steps=100, time_shift=0.3, shape=shape).sample
        assert drawn.mean().item() == pytest.approx(MEAN, abs=0.025)
        assert drawn.std().item() == pytest.approx(STD, abs=0.015)


def test_an_explicit_grid_is_taken_as_it_is() -> None:
    times = [0.0, 0.1, 0.35, 0.6, 1.0]
    for solver, asked in (("euler", times[:-1]), ("pseudo_corrector", times)):
        velocity = GaussianVelocity(LINEAR)
        ours = draw(LINEAR, velocity, solver=solver, times=times, steps=50, time_shift=0.3)
        assert velocity.times == pytest.approx(asked), "and neither steps nor shift"
    shifted = time_grid(10, 0.0, 1.0, 0.3)
    ours = draw(GVP, solver="heun", times=shifted).sample
    assert torch.equal(ours, draw(GVP, solver="heun", steps=10, time_shift=0.3).sample)
    assert explicit_grid(times, 1e-3, 1 - 1e-3)[0] == 1e-3
    assert explicit_grid(times, 1e-3, 1 - 1e-3)[-1] == 1 - 1e-3


@pytest.mark.parametrize(
    "times", [[], [0.0], [0.0, 0.5], [0.1, 1.0], [0.0, 0.5, 0.5, 1.0], [0.0, 0.7, 0.3, 1.0]]
)
def test_a_grid_that_does_not_lead_from_noise_to_data_is_refused(times: list[float]) -> None:
    with pytest.raises(
        UserError, match=r"sample\.times = .* does not rise from 0 to 1; begin with"
    ):
        draw(LINEAR, times=times)


def test_what_the_adaptive_solver_cannot_serve_is_refused() -> None:
    with pytest.raises(UserError, match=r"sample\.times is given.*sample\.solver = dopri5"):
        check_settings("dopri5", [0.0, 1.0], None, None, channels=3)
    with pytest.raises(UserError, match=r"sample\.guidance_cosine = 0\.99 .*use heun"):
        check_settings("dopri5", None, None, 0.99, channels=3)
    with pytest.raises(UserError, match=r"sample\.guidance_channels = 4 and data\.channels = 3"):
        check_settings("euler", None, 4, None, channels=3)
    check_settings("dopri5", None, 3, None, channels=3)
