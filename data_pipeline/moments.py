"""Mean and standard deviation of each channel, a few samples at a time."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass
class Moments:
    """count: numbers a channel; total, squares: (channels,) their sum and that of their squares."""

    count: int = 0
    total: Float64 = field(default_factory=lambda: np.zeros(1))
    squares: Float64 = field(default_factory=lambda: np.zeros(1))

    def add(self, values: NDArray[np.generic]) -> None:
        """(batch, channels, ...) numbers."""
        exact = values.astype(np.float64)
        others = (0, *range(2, exact.ndim))
        self.join(Moments(exact[:, 0].size, exact.sum(others), (exact**2).sum(others)))

    def join(self, other: "Moments") -> None:
        self.count += other.count
        self.total = self.total + other.total
        self.squares = self.squares + other.squares

    @property
    def mean(self) -> list[float]:
        return list((self.total / max(self.count, 1)).tolist())

    @property
    def std(self) -> list[float]:
        mean = self.total / max(self.count, 1)
        variance = self.squares / max(self.count, 1) - mean**2
        return list(np.sqrt(np.maximum(variance, 0)).tolist())
