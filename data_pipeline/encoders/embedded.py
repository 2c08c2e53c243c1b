"""What encoders of captions give."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Embedded:
    """Captions as a model is conditioned on them, float32.

    tokens: (tokens, width) embeddings of each caption, without padding
    pooled: (batch, width), one vector a caption, where the encoder has one
    cut: how many captions were longer than the encoder reads
    """

    tokens: list[Tensor]
    pooled: Tensor | None
    cut: int
