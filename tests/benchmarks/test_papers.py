"""The problem on which papers are tried is what it says; claims are met (slow)."""

import math

import pytest
import torch

from benchmarks import calibration
from benchmarks.calibration import Baseline, energy, fresh_data, fresh_noise, objective, train
from benchmarks.papers import CHECKS, measure
from benchmarks.papers_paths import discrete


def test_the_data_are_eight_gaussians():
    points = fresh_data(count=20_000)
    distance = torch.cdist(points, calibration.centres())
    nearest, which = distance.min(1)
    count = torch.bincount(which, minlength=8) / 20_000
    assert ((count - 1 / 8).abs() < 4 * math.sqrt(7 / 64 / 20_000)).all()
    # Squared distance of two coordinates.
    assert nearest.square().mean().item() == pytest.approx(2 * 0.15**2, rel=0.05)


def test_distances_are_without_bias():
    """Two sets of one law are as often nearer than 0 as farther; a shift is seen."""
    found = [energy(fresh_data(seed, 300), fresh_data(seed + 50, 300)) for seed in range(30)]
    assert abs(sum(found) / 30) < 4 * torch.tensor(found).std() / math.sqrt(30)
    assert energy(fresh_data(1, 300) + 1, fresh_data(2, 300)) > 0.1


def test_a_few_steps_learn_something():
    """Of the whole way, which takes 4,000: pairs, coupled and chunked alike."""
    data, before = fresh_data(), energy(fresh_noise(1), fresh_data())
    trained = train(objective(), steps=150)
    assert energy(trained.sample(20), data) < 0.5 * before
    pairs = (fresh_noise(3), trained.carry(fresh_noise(3), 20))
    again = train(objective(), steps=60, pairs=pairs, start=trained.network)
    assert energy(again.sample(1), data) < energy(trained.sample(1), data)


def test_a_check_that_trains_nothing():
    (row,) = discrete(Baseline())
    assert row.met, row


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", CHECKS)
def test_claims_are_met(name):
    missed = [row for row in measure([name], 0, note=lambda text: None) if not row.met]
    assert not missed
