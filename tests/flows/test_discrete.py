"""Discrete flow matching: mixture paths, their losses at the exact posterior, their chains of jumps."""

import itertools
import math

import pytest
import torch
from scipy import stats

from flows.batch import Batch
from flows.mixture import MixturePath, to_image, to_tokens
from flows.objectives.discrete import DiscreteFlowMatching
from flows.randomness import Draw
from flows.samplers.discrete import sample_tokens
from flows.times import TimeDistribution

SOURCES = ("mask", "uniform")
LEVELS = 4
PAIRS = list(itertools.product(range(LEVELS), repeat=2))
# Two tokens of four symbols that know much of each other.
LAW = torch.tensor([[8.0, 1, 0, 3], [0, 2, 6, 0], [1, 0, 4, 1], [5, 0, 2, 7]]).double()
LAW = LAW / LAW.sum()
UNIFORM = TimeDistribution("uniform", 0.0, 1.0, 1.0)


def path(source="mask", exponent=1.0, levels=LEVELS):
    return MixturePath(levels, source, exponent)


def posterior(
    chosen: MixturePath, x: torch.Tensor, t: torch.Tensor, law: torch.Tensor = LAW
) -> torch.Tensor:
    """(batch, 2, LEVELS) exact p(x1 of a token | x_t) under `law`, by summing over all pairs."""
    kappa = chosen.kappa(t.double())[:, None]
    source = chosen.source_law().double()

    def likelihood(token):  # (batch, LEVELS) p(x_t | x1)
        stays = (1 - kappa) * source[token][:, None]
        return stays + kappa * torch.nn.functional.one_hot(token, LEVELS + 1)[:, :LEVELS]

    first, second = likelihood(x[:, 0]), likelihood(x[:, 1])
    joint = law * first[:, :, None] * second[:, None, :]
    joint = joint / joint.sum((1, 2), keepdim=True)
    return torch.stack([joint.sum(2), joint.sum(1)], 1)


def images_of(n, seed=0):
    """Images of two pixels drawn by LAW."""
    index = torch.multinomial(
        LAW.flatten(), n, replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    tokens = torch.tensor(PAIRS)[index]
    return to_image(tokens, LEVELS, (1, 1, 2)), tokens


def objective(chosen, loss_kind="cross_entropy", label_drop=0.0):
    return DiscreteFlowMatching(chosen, loss_kind, label_drop, null_label=3, time=UNIFORM)


def prepared(chosen, n=4000):
    image, _ = images_of(n)
    batch = Batch(image, torch.zeros(n, dtype=torch.int64), torch.arange(n))
    return chosen.prepare(batch, Draw(5, 1, batch.position))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_images_and_tokens(levels):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(levels, (3, 4 * 5 * 2), generator=generator)
    image = to_image(tokens, levels, (2, 4, 5))
    assert image.shape == (3, 2, 4, 5)
    assert image.abs().max() <= 1
    assert torch.equal(to_tokens(image, levels), tokens)
    assert tokens[0, 2 * (5 * 3 + 1) + 1] == to_tokens(image[:, 1:, 3:4, 1:2], levels)[0, 0]
    noisy = image + 0.9 / (levels - 1) * (2 * torch.rand(image.shape, generator=generator) - 1)
    assert torch.equal(to_tokens(noisy, levels), tokens)
    ends = to_tokens(torch.tensor([-7.0, -1.0, 1.0, 7.0]).reshape(1, 1, 2, 2), levels)
    assert ends.tolist() == [[0, 0, levels - 1, levels - 1]]


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.5])
def test_kappa_and_its_rate(exponent):
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    chosen = path(exponent=exponent)
    kappa = chosen.kappa(t)
    (slope,) = torch.autograd.grad(kappa.sum(), t)
    assert torch.allclose(chosen.rate(t), slope / (1 - kappa), rtol=1e-12)
    assert chosen.kappa(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    assert chosen.rate(torch.tensor(0.0)) == (1.0 if exponent == 1.0 else 0.0)
    assert (kappa.diff() > 0).all()


@pytest.mark.parametrize("source", SOURCES)
def test_tokens_are_data_with_probability_kappa(source):
    chosen = path(source, exponent=2.0)
    n = 40_000
    data = torch.full((n, 2), 3)
    for time in (0.0, 0.3, 0.8, 1.0):
        x = chosen.mix(data, torch.full((n,), time), Draw(1, 0, torch.arange(n)))
        count = torch.bincount(x.flatten(), minlength=LEVELS + 1).double() / (2 * n)
        expected = (1 - time**2) * chosen.source_law().double()
        expected[3] += time**2
        error = 4 * (expected * (1 - expected) / (2 * n)).sqrt()
        assert ((count - expected).abs() <= error + 1e-12).all(), time


@pytest.mark.parametrize("source", SOURCES)
def test_jump_rates_of_the_exact_posterior_are_a_generator(source):
    """Rows of u = rate (p - delta) sum to zero, and leave in no negative measure."""
    chosen = path(source)
    x = torch.tensor(list(itertools.product(range(LEVELS + (source == "mask")), repeat=2)))
    t = torch.full((len(x),), 0.4, dtype=torch.float64)
    u = torch.zeros(len(x), 2, LEVELS + 1, dtype=torch.float64)
    reached = posterior(chosen, x, t).isfinite().all(-1).all(-1)
    u[..., :LEVELS] = posterior(chosen, x, t)
    u -= torch.nn.functional.one_hot(x, LEVELS + 1)
    u = chosen.rate(t)[:, None, None] * u
    assert torch.allclose(u[reached].sum(-1), torch.zeros(()).double(), atol=1e-12)
    off = u.scatter(-1, x[..., None], 0.0)
    assert (off[reached] >= 0).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loss_kind", ["cross_entropy", "kullback_leibler"])
def test_losses_are_the_published_ones_and_least_at_the_posterior(source, loss_kind):
    chosen = objective(path(source), loss_kind)
    ready = prepared(chosen)
    x, t, data = ready.inputs["x"], ready.time, ready.targets["data"]
    exact = posterior(chosen.path, x, t).clamp_min(1e-30).log()
    loss = chosen.loss(exact, ready.targets)
    assert loss.shape == (4000,)
    law = exact.exp()
    right = law.gather(-1, data[..., None]).squeeze(-1)
    if loss_kind == "cross_entropy":
        expected = -right.log()
    else:
        same = (x == data).double()
        padded = torch.cat((law, torch.zeros(4000, 2, 1).double()), -1)
        stays = padded.gather(-1, x[..., None]).squeeze(-1)
        rate = 1 / (1 - t.double())[:, None]
        expected = -rate * (stays - same + (1 - same) * right.log())
    assert torch.allclose(loss.double(), expected.mean(1), rtol=1e-4, atol=1e-5)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        other = exact + 0.3 * torch.randn(exact.shape, generator=generator)
        assert chosen.loss(other, ready.targets).mean() > loss.mean()


def test_a_perfect_prediction_of_known_data_costs_nothing():
    """One image alone: p(x1) = 1, and no jump is missing."""
    for source, loss_kind in itertools.product(SOURCES, ("cross_entropy", "kullback_leibler")):
        chosen = objective(path(source), loss_kind)
        ready = prepared(chosen, 50)
        sure = 60.0 * torch.nn.functional.one_hot(ready.targets["data"], LEVELS)
        assert chosen.loss(sure, ready.targets).abs().max() < 1e-6


def histogram(source, steps, corrector=0.0, exponent=1.0, n=8000):
    """Counts of pairs sampled with the exact posterior in place of a network."""
    chosen = path(source, exponent)

    def predict(x, t, condition):
        exact = posterior(chosen, x, t)
        # Euler may reach pairs that LAW does not have; whatever follows is as good.
        return exact.nan_to_num(nan=1.0 / LEVELS).clamp_min(1e-30).log()

    label = {"label": torch.zeros(n, dtype=torch.int64)}
    drawn = sample_tokens(
        predict,
        label,
        label,
        torch.arange(n),
        path=chosen,
        tokens=2,
        steps=steps,
        corrector=corrector,
        guidance=1.0,
        seed=3,
    )
    assert (drawn.network_calls == steps).all()
    return torch.bincount(drawn.tokens @ torch.tensor([LEVELS, 1]), minlength=16).double()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("corrector", "exponent"), [(0.0, 1.0), (0.0, 2.0), (1.0, 1.0)])
def test_the_exact_posterior_gives_the_data(source, corrector, exponent):
    found = histogram(source, 160, corrector, exponent)
    inside = LAW.flatten() > 0
    # Both tokens of a pair may jump in one step, each without the other: one in `steps` pairs.
    assert found[~inside].sum() < 8000 * 3 / 160
    expected = LAW.flatten()[inside] * found[inside].sum()
    assert stats.chisquare(found[inside].numpy(), expected.numpy()).pvalue > 0.01


def test_one_step_draws_tokens_by_themselves():
    """Its only network call sees nothing of the data: a product of marginals, far from LAW."""
    found = histogram("mask", 1)
    product = LAW.sum(1)[:, None] * LAW.sum(0)
    assert stats.chisquare(found.numpy(), (product * 8000).flatten().numpy()).pvalue > 0.01
    assert found[LAW.flatten() == 0].sum() > 1000


def test_guidance_multiplies_laws():
    """p^w / p_null^(w - 1) at the one step that is the whole chain; w = 1 asks for no second call."""
    asked = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    unasked = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()

    def predict(x, t, condition):
        chosen = torch.where(condition["label"][:, None] == 3, unasked, asked)
        return chosen[:, None, :].expand(len(x), 2, 4)

    n = 20_000
    label = {"label": torch.zeros(n, dtype=torch.int64)}
    null = {"label": torch.full((n,), 3)}
    for w, calls in ((1.0, 1), (2.0, 2), (0.0, 2)):
        drawn = sample_tokens(
            predict, label, null, torch.arange(n), path=path(), tokens=2, steps=1, corrector=0.0,
            guidance=w, seed=0,
        )  # fmt: skip
        law = torch.softmax(unasked + w * (asked - unasked), 0).double()
        count = torch.bincount(drawn.tokens.flatten(), minlength=4)
        assert stats.chisquare(count.numpy(), (law / law.sum() * 2 * n).numpy()).pvalue > 1e-3, w
        assert (drawn.network_calls == calls).all()


def test_samples_do_not_depend_on_their_batch():
    chosen = path("uniform")

    def predict(x, t, condition):
        return posterior(chosen, x, t).clamp_min(1e-30).log()

    def draw(ids):
        label = {"label": torch.zeros(len(ids), dtype=torch.int64)}
        settings = {"tokens": 2, "steps": 7, "corrector": 0.5, "guidance": 1.0, "seed": 9}
        return sample_tokens(predict, label, label, ids, path=chosen, **settings).tokens

    whole = draw(torch.arange(40))
    assert torch.equal(draw(torch.tensor([31, 2, 5])), whole[[31, 2, 5]])


def test_masked_tokens_only_become_data():
    """Without a corrector a token that has arrived stays."""
    chosen, seen = path("mask"), []

    def predict(x, t, condition):
        seen.append(x.clone())
        # Without pairs that cannot be: two tokens that jump at once may make any.
        return posterior(chosen, x, t, (LAW + 0.01) / (LAW + 0.01).sum()).clamp_min(1e-30).log()

    label = {"label": torch.zeros(500, dtype=torch.int64)}
    settings = {"tokens": 2, "steps": 20, "corrector": 0.0, "guidance": 1.0, "seed": 1}
    sample_tokens(predict, label, label, torch.arange(500), path=chosen, **settings)
    assert (seen[0] == LEVELS).all()
    for before, after in itertools.pairwise(seen):
        arrived = before != LEVELS
        assert torch.equal(after[arrived], before[arrived])
    share = (seen[10] == LEVELS).double().mean()
    assert abs(share - 0.5) < 4 * math.sqrt(0.25 / 1000)


def test_labels_are_hidden_at_their_rate():
    ready = prepared(objective(path(), label_drop=0.3))
    assert set(ready.inputs) == {"x", "t", "label"}
    hidden = (ready.inputs["label"] == 3).double().mean().item()
    assert abs(hidden - 0.3) < 4 * (0.21 / 4000) ** 0.5
