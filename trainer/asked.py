"""What samples are asked to be: classes in turn, or the captions of images that are really there.

Which class or caption a sample is asked for is a function of its id alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.faults import Tolerance
from data_pipeline.loader import texts_in_file_order
from data_pipeline.texts import TextMember
from trainer.recipe import Recipe
from trainer.storage import reach_storage


@dataclass(frozen=True)
class Asked:
    """labels: (n,) int64 classes; text: (n, tokens, width) embedded captions, None without."""

    labels: Tensor
    text: Tensor | None

    def take(self, rows: Tensor) -> "Asked":
        """Some of them, by (m,) indices."""
        return Asked(self.labels[rows], None if self.text is None else self.text[rows])

    def condition(self, device: torch.device) -> dict[str, Tensor]:
        """What a network and its samplers are given."""
        given = {"label": self.labels.to(device)}
        return given if self.text is None else {**given, "text": self.text.to(device)}


def text_member(recipe: Recipe) -> TextMember | None:
    """Where the recipe's samples hold their captions; None if it reads none."""
    section = recipe.data.text
    return None if section is None else TextMember(**section.model_dump())


def ask(recipe: Recipe, ids: Tensor) -> Asked:
    """What samples (n,) `ids` are asked to be.

    With captions: those, and the classes, of held-out samples in the order of their shards (of training
    samples if none are held out), from the start again when they end.
    """
    member, data = text_member(recipe), recipe.data
    if member is None:
        return Asked(ids.remainder(data.classes), None)
    reach_storage(recipe)
    shards = data.heldout or data.sources[0][0]
    labels, text = texts_in_file_order(
        shards,
        ids,
        member,
        classes=data.classes,
        tolerate=Tolerance(data.max_bad_fraction, None, None),
    )
    return Asked(labels, text)
