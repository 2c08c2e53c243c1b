"""Couplings: right plans, right marginals, and pairs that lie nearer than chance puts them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import linear_sum_assignment

from flows.couplings import (
    Coupling,
    assignment,
    draw_partners,
    gibbs_weights,
    other_samples,
    sinkhorn,
    squared_distances,
    stable_matching,
)
from flows.randomness import Draw

KINDS = ("assignment", "entropic", "stable")
EXACT = {"tolerance": 1e-12, "iterations": 20_000}


def sets(n=64, dimensions=2, seed=0):
    """Data in eight clusters on a circle, and standard normal noise."""
    draw = Draw(seed, 0, torch.arange(n))
    angle = (draw.uniform("cluster") * 8).floor() * (math.pi / 4)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    if dimensions > 2:
        centre = torch.cat((centre, torch.zeros(n, dimensions - 2)), 1)
    return centre + 0.15 * draw.normal("spread", (dimensions,)), draw.normal("noise", (dimensions,))


def mean_cost(data, noise):
    return (data - noise).double().square().flatten(1).sum(1).mean().item()


def couple(kind, data, noise, epsilon=0.5, group=0, step=0):
    draw = Draw(7, step, torch.arange(len(data)))
    return Coupling(kind, epsilon, group)(data, noise, draw)


def test_distances():
    x, y = torch.randn(5, 3, 2, dtype=torch.float64), torch.randn(4, 3, 2, dtype=torch.float64)
    expected = torch.cdist(x.flatten(1), y.flatten(1)).square()
    assert torch.allclose(squared_distances(x, y), expected, rtol=1e-12)


def test_assignment_is_the_cheapest():
    data, noise = sets()
    cost = squared_distances(data, noise)
    rows, columns = linear_sum_assignment(cost.numpy())
    chosen = assignment(cost)
    total = cost[torch.arange(64), chosen].sum().item()
    assert total == pytest.approx(cost.numpy()[rows, columns].sum(), rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        other = torch.randperm(64, generator=generator)
        assert total <= cost[torch.arange(64), other].sum()
    small = squared_distances(data[:5], noise[:5])
    best = min(
        sum(small[i, p[i]].item() for i in range(5)) for p in itertools.permutations(range(5))
    )
    assert small[torch.arange(5), assignment(small)].sum().item() == pytest.approx(best, rel=1e-12)


def test_assignment_in_one_dimension_sorts():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 100, 1, generator=generator)
    chosen = y[assignment(squared_distances(x, y))].flatten()
    assert torch.equal(chosen[x.flatten().argsort()], y.flatten().sort().values)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 1000), ties=st.booleans())
def test_stable_pairs_are_stable(n, seed, ties):
    """Nobody has a partner they would both rather leave; what taking the cheapest by turns gives."""
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cost = (cost * 4).floor() if ties else cost
    chosen = stable_matching(cost)
    assert sorted(chosen.tolist()) == list(range(n))
    own = cost[torch.arange(n), chosen]
    theirs = torch.empty_like(own)
    theirs[chosen] = own
    assert not ((cost < own[:, None]) & (cost < theirs)).any()
    if not ties:
        by_turns, rows, columns = [-1] * n, set(), set()
        for place in cost.flatten().argsort().tolist():
            i, j = divmod(place, n)
            if i not in rows and j not in columns:
                by_turns[i] = j
                rows.add(i)
                columns.add(j)
        assert chosen.tolist() == by_turns


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 8.0])
def test_plans_have_equal_marginals_and_the_form_of_the_optimum(epsilon):
    data, noise = sets(40)
    cost = squared_distances(data, noise)
    plan = sinkhorn(cost, epsilon, **EXACT)
    for axis in (0, 1):
        assert torch.allclose(plan.sum(axis) * 40, torch.ones(40).double(), rtol=1e-9)
    # exp((f + g - cost) / epsilon): its logarithm plus cost / epsilon has no interaction.
    logarithm = plan.log() + cost / epsilon
    centred = logarithm - logarithm.mean(0) - logarithm.mean(1, keepdim=True) + logarithm.mean()
    assert centred.abs().max() < 1e-8 / epsilon


def test_plans_between_independence_and_assignment():
    data, noise = sets(40)
    cost = squared_distances(data, noise)
    best = cost[torch.arange(40), assignment(cost)].mean().item()
    costs = [
        (sinkhorn(cost, e, tolerance=1e-6, iterations=20_000) * cost).sum().item()
        for e in (1e4, 10.0, 1.0, 0.1, 0.01)
    ]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(cost.mean().item(), rel=1e-3)
    assert best <= costs[-1] <= 1.02 * best


def test_a_plan_of_few_turns_has_exact_rows():
    cost = squared_distances(*sets(64, 16))
    plan = sinkhorn(cost, 0.1, tolerance=1e-3, iterations=3)
    assert torch.allclose(plan.sum(1) * 64, torch.ones(64).double(), rtol=1e-12)


def test_partners_are_drawn_by_their_share():
    plan = torch.tensor([[0.1, 0.0, 0.3], [0.2, 0.15, 0.05]], dtype=torch.float64)
    n = 30_000
    uniform = torch.rand(n, 2, generator=torch.Generator().manual_seed(3))
    rows = torch.stack([draw_partners(plan, u) for u in uniform])
    for row in range(2):
        count = torch.bincount(rows[:, row], minlength=3).double()
        share = plan[row] / plan[row].sum()
        assert ((count / n - share).abs() <= 4 * (share * (1 - share) / n).sqrt() + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [0, 16, 24])
def test_couplings_shorten_the_way_and_keep_the_noise(kind, group):
    data, noise = sets(128)
    coupled = couple(kind, data, noise, group=group)
    assert coupled.weight is None
    assert mean_cost(data, coupled.noise) < 0.7 * mean_cost(data, noise)
    if kind != "entropic":  # which may draw a noise twice
        for part in range(0, 128, group or 128):
            ours, theirs = (x[part : part + (group or 128)] for x in (coupled.noise, noise))
            assert torch.equal(ours.sort(0).values, theirs.sort(0).values)
    if kind == "assignment":
        assert couple(kind, data, noise, group=16).noise.ne(coupled.noise).any() or group == 16


def test_the_whole_batch_pairs_better_than_its_parts():
    """What a pairing on each rank alone would lose."""
    data, noise = sets(256)
    costs = [
        mean_cost(data, couple("assignment", data, noise, group=g).noise) for g in (0, 128, 32, 8)
    ]
    assert costs == sorted(costs)
    assert costs[-1] > 1.2 * costs[0]


@pytest.mark.parametrize("kind", KINDS)
def test_marginals_stay(kind):
    """Over many batches the noise that images are joined to is standard normal as before."""
    drawn = []
    for step in range(60):
        data, noise = sets(64, seed=step)
        drawn.append(couple(kind, data, noise, step=step).noise)
    for axis in range(2):
        assert stats.kstest(torch.cat(drawn)[:, axis].numpy(), "norm").pvalue > 1e-3


def gradient_spread(kind):
    """Total variance over batches of the gradient of |W x - u|^2 at t = 1/2, at the best W."""
    points, targets = [], []
    for step in range(100):
        data, noise = sets(64, seed=step)
        joined = noise if kind == "independent" else couple(kind, data, noise).noise
        points.append((data + joined) / 2)
        targets.append(data - joined)
    best = torch.linalg.lstsq(torch.cat(points), torch.cat(targets)).solution
    gradients = [x.T @ (x @ best - u) / 64 for x, u in zip(points, targets, strict=True)]
    return torch.stack(gradients).var(0).sum().item()


def test_coupled_gradients_vary_less():
    """Measured 0.68: what a linear network misses of the eight clusters varies in both."""
    assert gradient_spread("assignment") < 0.8 * gradient_spread("independent")


def test_gibbs_weights_of_atoms():
    """Five by five atoms, all pairs once: the weighted law is Gibbs' kernel, and the entropic plan is
    that with rows and columns scaled."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 5, 3, generator=generator)
    pairs = list(itertools.product(range(5), range(5)))
    data, noise = torch.stack([x[i] for i, _ in pairs]), torch.stack([y[j] for _, j in pairs])
    epsilon = 2.0
    law = gibbs_weights(data, noise, epsilon).double().reshape(5, 5) / 25
    cost = squared_distances(x, y)
    kernel = torch.exp(-cost / epsilon)
    assert torch.allclose(law, kernel / kernel.sum(), rtol=1e-6)
    ratio = (sinkhorn(cost, epsilon, **EXACT) / law).log()
    interaction = ratio - ratio.mean(0) - ratio.mean(1, keepdim=True) + ratio.mean()
    assert interaction.abs().max() < 1e-5
    assert ratio.abs().max() > 0.1  # they do differ


def test_weights_are_one_on_average_and_equal_where_epsilon_is_large():
    data, noise = sets(500, dimensions=48)
    coupled = couple("weighted", data, noise, epsilon=2.0)
    assert torch.equal(coupled.noise, noise)
    assert coupled.weight.dtype == torch.float32
    assert coupled.weight.mean().item() == pytest.approx(1, rel=1e-5)
    assert coupled.weight.max() > 5
    flat = couple("weighted", data, noise, epsilon=1e12).weight
    assert torch.allclose(flat, torch.ones(500), rtol=1e-6)


def test_others_are_of_other_classes():
    label = torch.tensor([0, 1, 1, 2, 0, 1, 3, 0])
    generator = torch.Generator().manual_seed(0)
    seen = {i: set() for i in range(8)}
    for _ in range(400):
        for i, j in enumerate(
            other_samples(label, torch.arange(8), torch.rand(8, generator=generator))
        ):
            seen[i].add(j.item())
    for i in range(8):
        assert seen[i] == {j for j in range(8) if label[j] != label[i]}
    n = 20_000
    other = other_samples(label, torch.full((n,), 3), torch.rand(n, generator=generator))
    count = torch.bincount(other, minlength=8).double()
    assert count[3] == 0
    assert ((count[label != 2] / n - 1 / 7).abs() < 4 * math.sqrt(1 / 7 / n)).all()


def test_others_of_one_class_are_any_others():
    one = torch.zeros(5, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    found = [
        other_samples(one, torch.arange(5), torch.rand(5, generator=generator)) for _ in range(99)
    ]
    for i, column in enumerate(torch.stack(found).T):
        assert set(column.tolist()) == set(range(5)) - {i}
    alone = other_samples(torch.tensor([4]), torch.tensor([0]), torch.tensor([0.3]))
    assert alone.tolist() == [0]


def test_weights_are_those_of_a_group_by_itself():
    data, noise = sets(12)
    groups = Coupling("weighted", 2.0, 5)(data, noise, Draw(7, 0, torch.arange(12))).weight
    alone = [gibbs_weights(*pair, 2.0) for pair in zip(data.split(5), noise.split(5), strict=True)]
    assert torch.equal(groups, torch.cat(alone))
    assert not torch.allclose(groups, gibbs_weights(data, noise, 2.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [*KINDS, "weighted"])
def test_the_same_pairs_on_a_gpu(kind):
    data, noise = sets(64)
    here = couple(kind, data, noise)
    samples = torch.arange(64, device="cuda")
    there = Coupling(kind, 0.5, 0)(data.cuda(), noise.cuda(), Draw(7, 0, samples))
    assert torch.equal(there.noise.cpu(), here.noise)
    if kind == "weighted":
        assert torch.allclose(there.weight.cpu(), here.weight, rtol=1e-5)
