"""What all distances of two sets of samples ask of them."""

from torch import Tensor


def check_sets(x: Tensor, y: Tensor) -> None:
    """Raises ValueError for a set of no samples, from which nothing is far."""
    if not len(x) or not len(y):
        raise ValueError(
            f"a distance of {len(x)} and {len(y)} samples has no meaning; give some of each"
        )
