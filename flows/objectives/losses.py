"""How far a prediction is from its target: one number a sample, in float32."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossShape = Literal["squared", "pseudo_huber", "squared_cosine"]

# Lee et al. 2024, "Improving the training of rectified flows": c for each dimension.
HUBER = 0.00054


def compare(shape: LossShape, prediction: Tensor, target: Tensor) -> Tensor:
    """(batch,) distance of prediction and target (batch, channels, ...).

    squared: the mean of squares
    pseudo_huber: (sqrt(|error|^2 + c^2) - c) / d with c = 0.00054 d and d dimensions, which grows as
        the length of the error and not as its square
    squared_cosine: squared + 1 - cos, the cosine over channels and averaged over places (Yao et al.
        2025, "LightningDiT")
    """
    error = (prediction - target).flatten(1)
    match shape:
        case "squared":
            return error.square().mean(1)
        case "pseudo_huber":
            dimensions = error.shape[1]
            c = HUBER * dimensions
            # As a quotient: the difference of two large numbers would lose the small errors.
            squared = error.square().sum(1)
            return squared / (torch.sqrt(squared + c**2) + c) / dimensions
        case "squared_cosine":
            cosine = F.cosine_similarity(prediction, target, dim=1)
            return error.square().mean(1) + 1 - cosine.flatten(1).mean(1)


def misalignment(projection: Tensor, features: Tensor) -> Tensor:
    """(batch,) minus the mean cosine of tokens (batch, tokens, width) of a network and of an encoder.

    Yu et al. 2025, "Representation alignment for generation" (REPA), equation 9.
    """
    cosine = F.cosine_similarity(projection.float(), features.float(), dim=-1)
    return -cosine.mean(1)
