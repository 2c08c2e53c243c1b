"""What samples are asked to be: classes in turn, captions of images that are really there, or prompts.

Which class or caption a sample is asked for is a function of its id alone.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data_pipeline.faults import Tolerance
from data_pipeline.file_order import texts_in_file_order
from trainer.prompts import embed_prompts, text_member
from trainer.recipe import Recipe
from trainer.storage import reach_storage


@dataclass(frozen=True)
class Asked:
    """labels: (n,) int64 places in `asked_names`; text: (n, tokens, width) embedded captions, None without.

    null_label: the class that a network is told in the place of `labels`, where these are of prompts
    """

    labels: Tensor
    text: Tensor | None
    null_label: int | None = None

    def take(self, rows: Tensor) -> "Asked":
        """Some of them, by (m,) indices."""
        text = None if self.text is None else self.text[rows]
        return replace(self, labels=self.labels[rows], text=text)

    def condition(self, device: torch.device) -> dict[str, Tensor]:
        """What a network and its samplers are given."""
        labels = self.labels
        if self.null_label is not None:
            labels = torch.full_like(labels, self.null_label)
        given = {"label": labels.to(device)}
        return given if self.text is None else {**given, "text": self.text.to(device)}


def asked_names(recipe: Recipe) -> list[str]:
    """What `Asked.labels` stand for: the recipe's prompts, or its classes."""
    return recipe.sample.prompts or recipe.data.names


def ask(recipe: Recipe, ids: Tensor) -> Asked:
    """What samples (n,) `ids` are asked to be.

    With captions: those, and the classes, of held-out samples in the order of their shards (of training
    samples if none are held out), from the start again when they end. With prompts: these in turn, of no
    class.
    """
    data, prompts = recipe.data, recipe.sample.prompts
    if data.text is None:
        return Asked(ids.remainder(data.classes), None)
    if prompts:
        which = ids.remainder(len(prompts))
        return Asked(which, embed_prompts(recipe, prompts)[which], data.classes)
    reach_storage(recipe)
    shards = data.heldout or data.sources[0][0]
    labels, text = texts_in_file_order(
        shards,
        ids,
        text_member(data.text),
        classes=data.classes,
        tolerate=Tolerance(data.max_bad_fraction, None, None),
    )
    return Asked(labels, text)
