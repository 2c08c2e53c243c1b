"""What a sample is conditioned on, left out now and then.

A network that is sometimes told nothing also learns p(x), for classifier-free guidance (Ho and
Salimans 2022). No class is the label `null_label`; no text is a text of zeros.
"""

import torch
from torch import Tensor

from flows.batch import Batch
from flows.randomness import Draw


def hidden(draw: Draw, drop: float) -> Tensor:
    """(batch,) bool: the samples, a share `drop` of all, whose network is told nothing."""
    return draw.uniform("label_drop") < drop


def kept_conditions(batch: Batch, draw: Draw, *, drop: float, null_label: int) -> dict[str, Tensor]:
    """`label`, and `text` where the batch has any; both are left out of the same samples."""
    kept = {"label": kept_label(batch, draw, drop=drop, null_label=null_label)}
    if "text" in batch.extras:
        left_out = hidden(draw, drop).view(-1, 1, 1)
        kept["text"] = batch.extras["text"].masked_fill(left_out, 0.0)
    return kept


def kept_label(batch: Batch, draw: Draw, *, drop: float, null_label: int) -> Tensor:
    """(batch,) int64 labels, a share `drop` of them replaced by `null_label`."""
    return torch.where(hidden(draw, drop), null_label, batch.label)


def kept_text(batch: Batch, draw: Draw, *, drop: float) -> Tensor:
    """(batch, tokens, width) embedded captions, a share `drop` of them all zeros."""
    text = batch.extras["text"]
    dropped = (draw.uniform("text_drop") < drop).view(-1, 1, 1)
    return text.masked_fill(dropped, 0.0)
