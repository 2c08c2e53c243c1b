"""The flow-matching objective: its value at the optimum, its weights, its randomness by key."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.batch import Batch
from flows.objectives.flow_matching import FlowMatching
from flows.paths import LINEAR, PATHS, path_named
from flows.randomness import Draw
from flows.samplers.ode import solve_ode
from flows.times import TimeDistribution

CLASSES = 7
PREDICTIONS = ("velocity", "data", "noise", "score")
EVERY_PATH = pytest.mark.parametrize("path", list(PATHS))


TIME = {"kind": "uniform", "mean": 0.0, "std": 1.0, "shift": 1.0}


def objective(path="linear", prediction="velocity", weighting="none", label_drop=0.1, **more):
    spread = TIME | {key: more.pop(key) for key in TIME if key in more}
    return FlowMatching(
        path_named(path),
        prediction,
        weighting,
        label_drop,
        CLASSES,
        TimeDistribution(**spread),
        **more,
    )


def batch(size, shape=(1, 4, 4), mean=0.0, std=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = mean + std * torch.randn(size, *shape, generator=generator)
    label = torch.randint(CLASSES, (size,), generator=generator)
    return Batch(image, label, torch.arange(size))


def prepare(chosen, samples, step=3):
    return chosen.prepare(samples, Draw(11, step, samples.position))


def perfect_outputs(chosen, samples, ready, dtype=torch.float32):
    """What a network that knows noise and image returns."""
    noise = Draw(11, 3, samples.position).normal("noise", tuple(samples.image.shape[1:])).to(dtype)
    image, t = samples.image.to(dtype), ready.time.to(dtype)
    return {
        "velocity": chosen.path.interpolate(image, noise, t).velocity,
        "data": image,
        "noise": noise,
        "score": -noise / chosen.path.coefficients(t, noise.dim()).sigma,
    }[chosen.prediction]


@EVERY_PATH
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inputs_and_targets_are_those_of_the_path(path, prediction):
    samples = batch(50)
    chosen = objective(path, prediction)
    ready = prepare(chosen, samples)
    noise = Draw(11, 3, samples.position).normal("noise", (1, 4, 4))
    point = chosen.path.interpolate(samples.image, noise, ready.time)
    expected = perfect_outputs(chosen, samples, ready)
    assert set(ready.inputs) == {"x", "t", "label"}
    assert torch.equal(ready.inputs["x"], point.x)
    assert torch.equal(ready.inputs["t"], ready.time)
    loss = chosen.loss(expected, ready.targets)
    assert loss.shape == (50,)
    assert loss.dtype == torch.float32
    assert loss.max() <= (1e-12 if prediction == "score" else 0)  # sigma (noise / sigma) rounds
    unit = chosen.path.coefficients(ready.time, 4).sigma if prediction == "score" else 1
    for dtype in (torch.bfloat16, torch.float64):
        off = chosen.loss((expected + 2 / unit).to(dtype), ready.targets)
        assert off.dtype == torch.float32
        assert torch.allclose(off, torch.full((50,), 4.0), rtol=0.1)


@EVERY_PATH
def test_loss_at_the_optimum_is_the_conditional_variance(path):
    """Data N(m, s^2) in every dimension: the best velocity is linear in x and its loss is known.

    v* = E[u] + Cov(u, x) / Var(x) (x - E[x]) and E (v* - u)^2 = Var(u) - Cov(u, x)^2 / Var(x).
    """
    mean, std = 0.4, 0.6
    samples = batch(3000, shape=(1, 8, 8), mean=mean, std=std)
    chosen = objective(path)
    ready = prepare(chosen, samples)
    x, t = ready.inputs["x"], ready.time
    c = chosen.path.coefficients(t, x.dim())
    var_x = (c.alpha * std) ** 2 + c.sigma**2
    covariance = c.alpha * c.alpha_dot * std**2 + c.sigma * c.sigma_dot
    var_u = (c.alpha_dot * std) ** 2 + c.sigma_dot**2
    best = c.alpha_dot * mean + covariance / var_x * (x - c.alpha * mean)
    expected = (var_u - covariance**2 / var_x).flatten()
    ratio = chosen.loss(best, ready.targets) / expected
    # 3000 x 64 squared normal errors over their variance: chi squared, standard error sqrt(2 / n).
    assert abs(ratio.mean().item() - 1) < 4 * (2 / (3000 * 64)) ** 0.5
    worse = chosen.loss(best + 0.3, ready.targets).mean()
    assert worse > chosen.loss(best, ready.targets).mean()


@EVERY_PATH
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_velocity_weighting_is_the_loss_of_the_implied_velocity(path, prediction):
    samples = batch(200)
    chosen = objective(path, prediction, "velocity")
    ready = prepare(chosen, samples)
    outputs = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    x, t = ready.inputs["x"].double(), ready.time.double()
    implied = chosen.velocity(outputs.double(), x, t)
    noise = Draw(11, 3, samples.position).normal("noise", (1, 4, 4))
    target = chosen.path.interpolate(samples.image.double(), noise.double(), t).velocity
    expected = (implied - target).square().mean((1, 2, 3))
    # x carries one float32 rounding, which the conversion amplifies by the gain near the ends.
    inside = (t > 0.05) & (t < 0.95)
    loss = chosen.loss(outputs, ready.targets).double()
    assert torch.allclose(loss[inside], expected[inside], rtol=1e-4)


def test_noise_weight_is_the_published_one():
    """omega = (g / sigma)^2 for noise predictions."""
    for path in PATHS:
        chosen = objective(path, "noise", "velocity")
        ready = prepare(chosen, batch(100))
        t = ready.time.double()
        c = chosen.path.coefficients(t)
        omega = (chosen.path.score_diffusion(t) / c.sigma).square()
        assert torch.allclose(ready.targets["weight"].double(), omega, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    order=st.permutations(range(9)),
    cut=st.integers(1, 8),
    path=st.sampled_from(list(PATHS)),
    prediction=st.sampled_from(PREDICTIONS),
    kind=st.sampled_from(["uniform", "logit_normal"]),
)
def test_a_sample_is_prepared_alike_in_every_batch(order, cut, path, prediction, kind):
    """Permuted and cut into microbatches, inputs and targets keep their bits, losses their size."""
    samples = batch(9)
    chosen = objective(path, prediction, "velocity", label_drop=0.5, kind=kind, shift=0.5)
    whole = prepare(chosen, samples)
    index = torch.tensor(order)
    mixed = Batch(samples.image[index], samples.label[index], samples.position[index])
    for number, part in enumerate(mixed.split(cut)):
        ready = prepare(chosen, part)
        rows = index[number * cut : (number + 1) * cut]
        for name in ("inputs", "targets"):
            for key, value in getattr(ready, name).items():
                assert torch.equal(value, getattr(whole, name)[key][rows]), key
        outputs = torch.zeros_like(part.image)
        loss = chosen.loss(outputs, ready.targets)
        expected = chosen.loss(torch.zeros_like(samples.image), whole.targets)[rows]
        assert torch.allclose(loss, expected, rtol=1e-6)


def test_labels_are_dropped_at_the_rate_asked_for():
    samples = batch(20_000, shape=(1, 1, 1))
    for rate in (0.0, 0.1, 0.7, 1.0):
        label = prepare(objective(label_drop=rate), samples).inputs["label"]
        assert label.dtype == torch.int64
        dropped = label == CLASSES
        assert torch.equal(label[~dropped], samples.label[~dropped])
        error = 4 * (rate * (1 - rate) / 20_000) ** 0.5
        assert abs(dropped.double().mean().item() - rate) <= error


def test_label_drop_is_independent_of_time_and_of_the_step_before():
    samples = batch(20_000, shape=(1, 1, 1))
    chosen = objective(label_drop=0.5)
    first, second = prepare(chosen, samples, step=0), prepare(chosen, samples, step=1)
    dropped = [(ready.inputs["label"] == CLASSES).float() for ready in (first, second)]
    for other in (first.time, dropped[1], first.inputs["x"].flatten(), second.time):
        assert abs(torch.corrcoef(torch.stack([dropped[0], other]))[0, 1]) < 4 / 20_000**0.5


@EVERY_PATH
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_times_stay_where_everything_is_finite(path, prediction):
    samples = batch(5000, shape=(1, 2, 2))
    chosen = objective(path, prediction, "velocity", kind="logit_normal", std=4.0)
    ready = prepare(chosen, samples)
    support = chosen.path.support(prediction, sampling=False)
    drawn = chosen.time(Draw(11, 3, samples.position).uniform("time"))
    assert torch.equal(ready.time, support.rescale(drawn))
    assert ready.time.min() >= support.low
    assert ready.time.max() <= support.high
    assert chosen.loss(torch.zeros_like(samples.image), ready.targets).isfinite().all()


@EVERY_PATH
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_velocity_for_samplers(path, prediction):
    """A perfect prediction of any kind gives the velocity of the path."""
    samples = batch(100)
    chosen = objective(path, prediction)
    ready = prepare(chosen, samples)
    t = ready.time.double()
    noise = Draw(11, 3, samples.position).normal("noise", (1, 4, 4))
    x = chosen.path.interpolate(samples.image.double(), noise.double(), t)
    velocity = chosen.velocity(perfect_outputs(chosen, samples, ready, torch.float64), x.x, t)
    assert torch.allclose(velocity, x.velocity, rtol=1e-9, atol=1e-9)


def test_it_is_a_value():
    """Two objectives with the same fields are the same; none can be changed in place."""
    assert objective() == objective()
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective().label_drop = 0.5


@EVERY_PATH
def test_conditional_and_marginal_gradients_are_the_same(path):
    """Of data that are eight atoms: at any x_t the mean of the gradients of |v - u(x_t | x1)|^2, each atom
    weighted by its posterior, is the gradient of |v - u_t(x_t)|^2, u_t the marginal velocity."""
    chosen = objective(path, label_drop=0.0)
    atoms = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for time in (0.2, 0.5, 0.7):
        t = torch.full((8,), time, dtype=torch.float64)
        c = chosen.path.coefficients(t[:1], 2)
        noise = torch.randn(3, generator=torch.Generator().manual_seed(int(10 * time)))
        x = (c.alpha * atoms.mean(0) + c.sigma * noise)[0]
        points = x.expand(8, 3)
        noise = chosen.path.data_to_noise(atoms, points, t)
        posterior = torch.softmax(-noise.square().sum(1) / 2, 0)
        velocity = (weights @ torch.cat((x, t[:1]))).expand(8, 3)
        targets = {"prediction": chosen.path.interpolate(atoms, noise, t).velocity}
        conditional = (velocity - targets["prediction"]).square().mean(1) @ posterior
        mean = (posterior @ atoms)[None]
        marginal = chosen.path.data_to_velocity(mean, x[None], t[:1])
        whole = (velocity[:1] - marginal).square().mean()
        ours, theirs = (
            torch.autograd.grad(loss, weights, retain_graph=True)[0]
            for loss in (conditional, whole)
        )
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
        assert conditional > whole  # by the conditional variance


def test_the_loss_bounds_the_distance_of_samples():
    """W2^2(data, samples) <= e^(1 + 2 L) times the loss above its least, L the Lipschitz constant of the
    network (Dao et al. 2023, theorem 1; Albergo et al. 2023): data N(0.4, 0.6^2), a network that is off
    by 0.1 x + 0.2. In one dimension both ODEs keep quantiles, so W2 is a mean over them."""
    mean, std = 0.4, 0.6
    chosen = objective(label_drop=0.0)

    def best(x, t):
        c = LINEAR.coefficients(t)
        variance = (c.alpha * std) ** 2 + c.sigma**2
        slope = (c.alpha * std**2 - c.sigma) / variance
        return mean + slope * (x - c.alpha * mean)

    def off(x, t):
        return best(x, t) + 0.1 * x + 0.2

    samples = batch(20_000, shape=(1,), mean=mean, std=std)
    ready = prepare(chosen, samples)
    x, t = ready.inputs["x"][:, 0], ready.time
    losses = [chosen.loss(v(x, t)[:, None], ready.targets).mean().item() for v in (off, best)]
    quantiles = torch.special.ndtri(torch.linspace(0, 1, 2001, dtype=torch.float64)[1:-1])
    grid = torch.linspace(0, 1, 101, dtype=torch.float64).tolist()
    ends = [
        solve_ode(
            lambda x, t, v=v: v(x, torch.tensor(t, dtype=torch.float64)), quantiles, grid, "rk4"
        )
        for v in (off, best)
    ]
    assert torch.allclose(ends[1], mean + std * quantiles, atol=1e-6)
    distance = (ends[0] - ends[1]).square().mean().item()
    lipschitz = 1.1  # of the best velocity 1, at both ends
    excess = losses[0] - losses[1]
    assert 0.05 < distance <= math.exp(1 + 2 * lipschitz) * excess
