"""Expert output masking (NLLB Team 2022, section 6.2.1): experts' outputs left out while training."""

from dataclasses import dataclass

from torch import Tensor

from flows.randomness import Draw


@dataclass(frozen=True)
class OutputMask:
    """What the outputs of experts are multiplied with.

    share: of outputs that are left out; the others grow, so that the mean stays
    shape: (layers, tokens, slots of a token)
    """

    share: float
    shape: tuple[int, int, int]

    def __call__(self, draw: Draw) -> Tensor:
        """(batch, *shape) float32, 0 or 1 / (1 - share)."""
        kept = draw.uniform("expert outputs", self.shape) >= self.share
        return kept / (1.0 - self.share)
