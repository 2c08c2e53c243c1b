"""Random changes to images: parameters drawn per sample, by its place in the stream, before
decoding."""

import numpy as np
import torch
from numpy.typing import NDArray

from flows.randomness import Draw


def draw_flips(positions: torch.Tensor, *, seed: int, probability: float) -> NDArray[np.bool_]:
    """(batch,) which samples are mirrored left to right.

    positions: (batch,) int64 places in the endless stream, so a sample may differ between epochs
    """
    if probability == 0:
        return np.zeros(len(positions), np.bool_)
    # The stream has no steps: a place in it is visited once.
    return (Draw(seed, 0, positions).uniform("flip") < probability).numpy()
