"""How good is a model? Told by a classifier of real images, by distances to real images, and by bits.

Images are (n, channels, height, width) in [-1, 1], labels (n,) int64.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flows.errors import UserError
from flows.metrics.features import Features
from trainer.bits import Bits
from trainer.distances import Distances, distances


@dataclass(frozen=True)
class Classifier:
    """A classifier of real training images, and how often it is right on real images it never saw."""

    model: Any
    heldout_accuracy: float


@dataclass(frozen=True)
class ClassAccuracy:
    """Share of samples that the classifier assigns to the class they were asked for.

    broken: samples with a number that is not finite; they count as wrong
    """

    accuracy: float
    heldout_accuracy: float
    per_class: dict[str, float]
    count: int
    broken: int


@dataclass(frozen=True)
class Evaluation:
    """What `flowmill evaluate` found."""

    classes: ClassAccuracy
    distances: Distances
    bits: Bits | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no numbers that are not finite: they are None."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, value, to compare with) for a table."""
        classes = self.classes
        worst = min(classes.per_class, key=classes.per_class.__getitem__)
        return [
            (
                f"class as asked for, of {classes.count} samples",
                f"{classes.accuracy:.1%}",
                f"{classes.heldout_accuracy:.1%} of real held-out images",
            ),
            ("worst class", f"{worst}: {classes.per_class[worst]:.1%}", ""),
            ("samples that are not finite", str(classes.broken), ""),
            *(
                (
                    f"{measure.name}, {self.distances.count} held-out images",
                    _figure(measure.samples),
                    f"{_figure(measure.real)} from as many real training images",
                )
                for measure in self.distances.measures
            ),
            *(self.bits.rows() if self.bits else []),
        ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figure(value: float | None) -> str:
    return "too few" if value is None else f"{value:.4g}"


def train_classifier(
    images: Tensor, labels: Tensor, heldout_images: Tensor, heldout_labels: Tensor
) -> Classifier:
    """A support vector machine on pixels, fitted to training images and tried on held-out ones.

    Raises UserError if the training images are all of one class.
    """
    from sklearn.svm import SVC

    if len(labels.unique()) < 2:
        raise UserError(
            "data.train: all images are of one class, so that no classifier can tell classes apart; "
            "evaluate on data with at least two."
        )
    model = SVC(C=10.0)
    model.fit(_pixels(images).numpy(), labels.cpu().numpy())
    found = model.predict(_pixels(heldout_images).numpy())
    return Classifier(model, float((found == heldout_labels.cpu().numpy()).mean()))


def class_accuracy(
    classifier: Classifier, samples: Tensor, asked: Tensor, names: Sequence[str]
) -> ClassAccuracy:
    """How many of `samples` are taken for the class in `asked`."""
    finite = torch.isfinite(samples).flatten(1).all(dim=1).cpu()
    found = torch.as_tensor(classifier.model.predict(_pixels(samples).numpy()))
    asked = asked.cpu()
    right = (found == asked) & finite
    per_class = {
        names[c]: right[asked == c].double().mean().item() for c in asked.unique().tolist()
    }
    accuracy = right.double().mean().item()
    return ClassAccuracy(
        accuracy=accuracy,
        heldout_accuracy=classifier.heldout_accuracy,
        per_class=per_class,
        count=len(asked),
        broken=int((~finite).sum()),
    )


def evaluate(
    samples: Tensor,
    asked: Tensor,
    train: tuple[Tensor, Tensor],
    heldout: tuple[Tensor, Tensor],
    names: Sequence[str],
    seed: int,
    bits: Bits | None = None,
    own: Features | None = None,
) -> Evaluation:
    """All judgements of `samples` that were asked to be of the classes `asked`.

    train, heldout: (images, labels) of real images
    bits: of the model, where it has a likelihood
    own: see `trainer.distances.distances`
    """
    classifier = train_classifier(*train, *heldout)
    return Evaluation(
        classes=class_accuracy(classifier, samples, asked, names),
        distances=distances(samples, train[0], heldout[0], seed, own),
        bits=bits,
    )


def _pixels(images: Tensor) -> Tensor:
    """(n, pixels) of images as they would be saved: in their range, black where not a number."""
    return images.detach().float().nan_to_num(nan=-1.0).clamp(-1, 1).flatten(1).cpu()
