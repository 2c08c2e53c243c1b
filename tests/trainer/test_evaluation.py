"""Good samples score well, bad ones badly, and both beside what real images score."""

import json
import math
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from flows.dequantisation import Levels, uniform_in_bin
from flows.errors import UserError
from flows.metrics.features import low_frequencies
from flows.models.flow import FlowOutput
from flows.objectives.likelihood import Likelihood
from flows.randomness import Draw
from trainer.bits import COMPONENTS, Bits, heldout_bits, measured_objective
from trainer.distances import Distances, distances
from trainer.evaluation import Evaluation, class_accuracy, evaluate, train_classifier
from trainer.recipe import load_recipe

NAMES = [f"digit {i}" for i in range(10)]
# Measures that are small for samples like the real ones; of the others 1 is best.
FAR = ("energy", "FD-", "polynomial", "sliced")


def of(found: Distances, name: str) -> tuple[float, float]:
    """The one measure whose name begins with `name`: of samples, and of real images."""
    (measure,) = (one for one in found.measures if one.name.startswith(name))
    assert measure.samples is not None
    assert measure.real is not None
    return measure.samples, measure.real


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target)


@pytest.fixture(scope="module")
def real(digits: tuple[Tensor, Tensor]) -> Evaluation:
    """Unseen real images, judged as if they were samples."""
    images, labels = digits
    train, heldout = (images[:1000], labels[:1000]), (images[1000:1400], labels[1000:1400])
    return evaluate(images[1400:], labels[1400:], train, heldout, NAMES, seed=0)


def test_what_is_not_finite_is_null_in_json(real: Evaluation) -> None:
    broken = Bits(math.nan, math.inf, 1.5, 2, 3, "images", 0.0, None)
    plain = replace(real, bits=broken).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["bits"].items() >= {"model": None, "error": None, "mixture": 1.5}.items()
    assert plain["classes"]["accuracy"] == real.classes.accuracy
    assert len(plain["distances"]["measures"]) == len(real.distances.measures)


def test_real_images_score_as_real_images_do(real: Evaluation) -> None:
    assert real.classes.count == 397
    assert real.classes.heldout_accuracy > 0.95
    assert abs(real.classes.accuracy - real.classes.heldout_accuracy) < 0.06
    assert set(real.classes.per_class) == set(NAMES)
    assert real.distances.count == 397
    for name in FAR:
        samples, beside = of(real.distances, name)
        assert samples < 3 * beside + 0.01, name
    for name in ("precision", "recall"):
        samples, beside = of(real.distances, name)
        assert samples > 0.8 * beside > 0.5, name


def test_the_record_is_json_and_a_table(real: Evaluation) -> None:
    data = json.loads(json.dumps(real.to_dict(), allow_nan=False))
    assert data["classes"]["accuracy"] == real.classes.accuracy
    energy = data["distances"]["measures"][0]
    assert (energy["samples"], energy["real"]) == of(real.distances, "energy")
    text = " ".join(" ".join(row) for row in real.rows())
    assert f"{real.classes.accuracy:.1%}" in text
    assert f"{energy['samples']:.4g}" in text
    worst = replace(real.classes, per_class=dict.fromkeys(NAMES, 1.0) | {"digit 7": 0.25})
    assert "digit 7: 25.0%" in str(replace(real, classes=worst).rows())


def test_bad_samples_are_told_from_good_ones(
    digits: tuple[Tensor, Tensor], real: Evaluation
) -> None:
    images, labels = digits
    classifier = train_classifier(images[:1000], labels[:1000], images[1000:], labels[1000:])
    wrong_class = class_accuracy(classifier, images[1000:], (labels[1000:] + 1) % 10, NAMES)
    assert wrong_class.accuracy < 0.05
    noise = torch.randn(397, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    collapsed = images[1400:1401].expand(397, -1, -1, -1)
    for bad in (noise, collapsed):
        found = distances(bad, images[:1000], images[1000:], 0)
        for name in FAR:
            assert of(found, name)[0] > 5 * abs(of(real.distances, name)[1]), name
    # Noise lies nowhere near digits; a single digit is a good one, and no other.
    assert of(distances(noise, images[:1000], images[1000:], 0), "precision")[0] < 0.1
    assert of(found, "precision")[0] > 0.9
    assert of(found, "recall")[0] < 0.1


def test_broken_samples_count_as_wrong_and_as_far(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    classifier = train_classifier(images[:1000], labels[:1000], images[1000:], labels[1000:])
    broken = images[1000:1400].clone()
    broken[::2, 0, 3, 3] = torch.nan
    found = class_accuracy(classifier, broken, labels[1000:1400], NAMES)
    assert found.broken == 200
    assert found.accuracy <= 0.5
    nothing = torch.full((400, 1, 8, 8), torch.nan)
    samples, beside = of(distances(nothing, images[:1000], images[1000:], 0), "energy")
    assert samples > 10 * beside


def test_sets_of_one_size_are_compared_chosen_by_the_seed(digits: tuple[Tensor, Tensor]) -> None:
    images, _ = digits
    first = distances(images[:300], images[300:1300], images[1300:1500], 1)
    assert first.count == 200
    assert first == distances(images[:300], images[300:1300], images[1300:1500], 1)
    assert first != distances(images[:300], images[300:1300], images[1300:1500], 2)


def test_too_few_samples_are_said_to_be(digits: tuple[Tensor, Tensor]) -> None:
    images, _ = digits
    found = distances(images[:3], images[300:1300], images[1300:1500], 0)
    unsaid = [measure.name for measure in found.measures if measure.samples is None]
    assert [name.split()[0] for name in unsaid] == ["precision", "recall"]


def test_a_network_of_ones_own_measures_beside_the_others(digits: tuple[Tensor, Tensor]) -> None:
    images, _ = digits
    sets = images[:200], images[300:1300], images[1300:1500]
    alone = distances(*sets, 0)
    found = distances(*sets, 0, low_frequencies(20))
    assert found.measures[: len(alone.measures)] == alone.measures
    added = {one.name: one for one in found.measures[len(alone.measures) :]}
    assert list(added) == [
        "FD-dct20", "polynomial MMD of dct20", "precision in dct20", "recall in dct20"
    ]  # fmt: skip
    assert all(of(found, name)[0] < math.inf for name in added)
    negative = distances(-images[:200], *sets[1:], 0, low_frequencies(20))
    assert of(negative, "FD-dct20")[0] > 10 * of(found, "FD-dct20")[0]
    few = distances(images[:199], *sets[1:], 0, low_frequencies(20))
    assert [one.name for one in few.measures if one.samples is None] == ["FD-dct20"]


class Affine(torch.nn.Module):
    """A flow that knows the mean and the spread of every pixel, and nothing else."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.spread = torch.nn.Parameter(images.std(0) + 0.01)
        self.mean = torch.nn.Parameter(images.mean(0))

    def forward(self, x: Tensor, label: Tensor) -> FlowOutput:
        z = ((x - self.mean) / self.spread).flatten(2)
        logdet = -self.spread.log().sum().expand(len(x))
        return FlowOutput(z, logdet, torch.zeros(len(x)))


def test_bits_of_a_flow_stand_beside_those_of_a_mixture(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    levels = Levels(17, "inside")
    objective = Likelihood(
        dequantisation="uniform", levels=levels, noise=0.0, power=0.0, label_drop=0.0,
        null_label=10, text_drop=None,
    )  # fmt: skip
    heldout = images[1000:], labels[1000:]
    flow = Affine(uniform_in_bin(images[:1000], levels, Draw(1, 0, torch.arange(1000))).y)
    found = heldout_bits(flow, objective, images[:1000], heldout, seed=0)
    assert (found.count, found.components) == (797, COMPONENTS)
    # One Gaussian for each pixel is worse than five, and both are better than guessing a level.
    assert found.mixture < found.model < math.log2(17)
    assert 0 < found.error < 0.1
    assert found.rows()[0][0] == "bits per dimension of 797 held-out images"
    again = heldout_bits(flow, objective, images[:1000], heldout, seed=0)
    assert again == found
    # The same density, of a flow that keeps volumes and a prior that is as wide as the data.
    shift = Affine(flow.mean.detach()[None].expand(2, -1, -1, -1))
    shift.mean.data, shift.spread.data = flow.mean.data, torch.ones_like(flow.spread)
    variance = flow.spread.detach().square().flatten(1)
    same = heldout_bits(shift, objective, images[:1000], heldout, seed=0, variance=variance)
    assert same.model == pytest.approx(found.model, abs=1e-5)


def test_bits_of_data_with_noise_are_those_of_a_density(digits: tuple[Tensor, Tensor]) -> None:
    """The flow that is exact for the noise alone needs what the noise needs, and no bin is counted."""
    images, labels = digits
    nothing, std = torch.zeros_like(images), 0.3
    objective = Likelihood(
        dequantisation="none", levels=Levels(17, "inside"), noise=std, power=0.0, label_drop=0.0,
        null_label=10, text_drop=None,
    )  # fmt: skip
    flow = Affine(nothing)
    flow.spread.data.fill_(std)
    found = heldout_bits(flow, objective, nothing[:1000], (nothing[1000:], labels[1000:]), seed=0)
    assert found.least == pytest.approx(math.log2(std * math.sqrt(2 * math.pi * math.e)))
    assert found.model == pytest.approx(found.least, abs=4 * found.error)
    # Five Gaussians find the one there is, but for what a thousand images say of it.
    assert found.least < found.mixture < found.least + 0.05
    (what, _, beside), *_ = found.rows()
    assert what == "bits per dimension of the density of 797 held-out images with noise of 0.3"
    assert beside.endswith(f"{found.least:.4f} of the noise alone")
    real = heldout_bits(flow, objective, images[:1000], (images[1000:], labels[1000:]), seed=0)
    assert found.least < real.mixture < real.model


def test_only_what_has_a_likelihood_is_measured() -> None:
    noisy = measured_objective(load_recipe("starflow_emoji", []))
    assert noisy is not None
    assert (noisy.noise, noisy.label_drop, noisy.levels) == (0.3, 0.0, None)
    assert measured_objective(load_recipe("digits8", [])) is None
    # Single values of pixels have a density and no probability.
    assert measured_objective(load_recipe("jet_digits", ["objective.noise=0"])) is None
    filled = measured_objective(load_recipe("jet_bits", []))
    assert filled is not None
    assert filled.bin_width == 2 / 255


def test_one_class_is_no_classification(digits: tuple[Tensor, Tensor]) -> None:
    images, _ = digits
    labels = torch.zeros(len(images), dtype=torch.int64)
    with pytest.raises(UserError, match=r"data\.train: .* at least two"):
        train_classifier(images, labels, images, labels)
