"""A density that anyone can fit: for each pixel by itself, a mixture of Gaussians.

A flow that models images must need fewer bits, for this one knows nothing of any other pixel.
"""

import math
import warnings

import numpy as np
import torch
from torch import Tensor


def gaussian_mixture_bits(
    train: Tensor, heldout: Tensor, *, components: int, bin_width: float, seed: int
) -> Tensor:
    """(m,) float64 bits per dimension of held-out images, by scikit-learn.

    train: (n, ...) and heldout: (m, ...) dequantised, as the flow sees them
    components: of the mixture of each pixel
    bin_width: see `flows.dequantisation.Levels`; no component is narrower than a tenth of a bin
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    x, y = (part.flatten(1).double().cpu().numpy() for part in (train, heldout))
    nats = np.zeros(len(y))
    narrowest = (bin_width / math.sqrt(12) / 10) ** 2
    for pixel in range(x.shape[1]):
        mixture = GaussianMixture(components, reg_covar=narrowest, random_state=seed)
        with warnings.catch_warnings():
            # Of pixels with fewer values than components; the fit is as good as it can be.
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(x[:, pixel, None])
        nats += mixture.score_samples(y[:, pixel, None])
    bits = -(nats / x.shape[1] + math.log(bin_width)) / math.log(2)
    return torch.from_numpy(bits)
