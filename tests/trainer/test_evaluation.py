"""Good samples score well, bad ones badly, and both beside what real images score."""

import json
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from flows.errors import UserError
from trainer.evaluation import Evaluation, class_accuracy, energy, evaluate, train_classifier

NAMES = [f"digit {i}" for i in range(10)]


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


def test_real_images_score_as_real_images_do(real: Evaluation) -> None:
    assert real.classes.count == 397
    assert real.classes.heldout_accuracy > 0.95
    assert abs(real.classes.accuracy - real.classes.heldout_accuracy) < 0.06
    assert set(real.classes.per_class) == set(NAMES)
    assert real.energy.count == 397
    assert real.energy.samples < 3 * real.energy.real


def test_the_record_is_json_and_a_table(real: Evaluation) -> None:
    data = json.loads(json.dumps(real.to_dict(), allow_nan=False))
    assert data["classes"]["accuracy"] == real.classes.accuracy
    assert data["energy"]["real"] == real.energy.real
    text = " ".join(" ".join(row) for row in real.rows())
    assert f"{real.classes.accuracy:.1%}" in text
    assert f"{real.energy.samples:.4f}" in text
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
    assert energy(noise, images[:1000], images[1000:], 0).samples > 10 * real.energy.real
    collapsed = images[1400:1401].expand(397, -1, -1, -1)
    assert energy(collapsed, images[:1000], images[1000:], 0).samples > 10 * real.energy.real


def test_broken_samples_count_as_wrong_and_as_far(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    classifier = train_classifier(images[:1000], labels[:1000], images[1000:], labels[1000:])
    broken = images[1000:1400].clone()
    broken[::2, 0, 3, 3] = torch.nan
    found = class_accuracy(classifier, broken, labels[1000:1400], NAMES)
    assert found.broken == 200
    assert found.accuracy <= 0.5
    nothing = torch.full((400, 1, 8, 8), torch.nan)
    far = energy(nothing, images[:1000], images[1000:], 0)
    assert far.samples > 10 * far.real


def test_energy_uses_sets_of_one_size_chosen_by_the_seed(digits: tuple[Tensor, Tensor]) -> None:
    images, _ = digits
    first = energy(images[:300], images[300:1300], images[1300:1500], 1)
    assert first.count == 200
    assert first == energy(images[:300], images[300:1300], images[1300:1500], 1)
    assert first != energy(images[:300], images[300:1300], images[1300:1500], 2)


def test_one_class_is_no_classification(digits: tuple[Tensor, Tensor]) -> None:
    images, _ = digits
    labels = torch.zeros(len(images), dtype=torch.int64)
    with pytest.raises(UserError, match=r"data\.train: .* at least two"):
        train_classifier(images, labels, images, labels)
