"""The blocks of an MMDiT: two streams that meet in the attention, or one stream, see `flows.models.mmdit`.

All are called as `block(tokens, condition, turn, mask)` on [text | image] tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.models.attention import (
    Kernel,
    QueryKeyValue,
    attend,
    head_norm,
    see_all,
    split_heads,
)
from flows.models.division import Division, Linear
from flows.models.feedforward import RATIO, FeedForward
from flows.models.mmdit_config import MMDiTConfig
from flows.models.norms import gated_residual, modulated_norm

HEAD_EPSILON = 1e-5  # of the norms of queries and keys


class Stream(nn.Module):
    """What one modality has of its own in a double block.

    updated: false for a text that nobody reads any more: it only serves as keys and values
    """

    def __init__(self, config: MMDiTConfig, *, updated: bool) -> None:
        super().__init__()
        width = config.width
        self.head_width = config.head_width
        self.modulation = nn.Linear(width, (6 if updated else 2) * width)
        # A plain layer: keys of both streams compete, so that a bias of one of them counts.
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = head_norm(config.head_width, exists=config.qk_norm, epsilon=HEAD_EPSILON)
        self.key_norm = head_norm(config.head_width, exists=config.qk_norm, epsilon=HEAD_EPSILON)
        self.out = nn.Linear(width, width) if updated else None
        self.feedforward = FeedForward(width) if updated else None

    def heads(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the normalised tokens."""
        qkv = self.qkv(modulated_norm(x, shift, scale))
        query, key, value = split_heads(qkv, self.head_width)
        return self.query_norm(query), self.key_norm(key), value

    def update(self, x: Tensor, mixed: Tensor, vectors: tuple[Tensor, ...]) -> Tensor:
        """The tokens after what attention mixed for them, and after the feed-forward."""
        if self.out is None or self.feedforward is None:
            return x
        gate_1, shift_2, scale_2, gate_2 = vectors
        x = gated_residual(x, gate_1, self.out(mixed))
        return gated_residual(x, gate_2, self.feedforward(modulated_norm(x, shift_2, scale_2)))

    def division(self) -> Division:
        width = self.qkv.in_features
        layers = {"qkv": Linear("column", (width,) * 3)}
        if self.out is not None:
            layers["out"] = Linear("row", (width,))
        return Division(
            layers=layers,
            enters=("qkv",),
            shared=("query_norm", "key_norm"),
            divisible={"heads": width // self.head_width},
        )


class Double(nn.Module):
    """Two streams with their own weights and one attention over the tokens of both."""

    def __init__(self, config: MMDiTConfig, *, text_updated: bool) -> None:
        super().__init__()
        self.text_tokens = config.text_tokens
        self.text = Stream(config, updated=text_updated)
        self.image = Stream(config, updated=True)
        self.kernel: Kernel = see_all

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor,
        turn: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """[text | image] tokens (batch, tokens, width), condition (batch, width) -> like tokens.

        The condition has been through its SiLU, which all blocks share.
        turn: (2, tokens, head width / 2) of the rotary places, if there are any
        mask: (batch, 1, 1, tokens) bool, false for keys that nobody sees
        """
        sizes = (self.text_tokens, tokens.shape[1] - self.text_tokens)
        streams = (self.text, self.image)
        parts = tokens.split(sizes, dim=1)
        vectors = [_vectors(stream.modulation, condition) for stream in streams]
        heads = [
            stream.heads(x, shift, scale)
            for stream, x, (shift, scale, *_) in zip(streams, parts, vectors, strict=True)
        ]
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        together = attend(self.kernel, query, key, value, turn, mask)
        mixed = together.split([own[0].shape[2] for own in heads], dim=1)
        return torch.cat(
            [
                stream.update(x, joined, own[2:])
                for stream, x, joined, own in zip(streams, parts, mixed, vectors, strict=True)
            ],
            dim=1,
        )


class Single(nn.Module):
    """One stream: attention and feed-forward read the same normalised tokens, and add one update."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.width, self.head_width = width, config.head_width
        self.modulation = nn.Linear(width, 3 * width)
        self.up: nn.Linear = (
            nn.Linear(width, (3 + RATIO) * width)
            if config.qk_norm or config.rope
            else QueryKeyValue(width, extra=RATIO * width)
        )
        self.query_norm = head_norm(self.head_width, exists=config.qk_norm, epsilon=HEAD_EPSILON)
        self.key_norm = head_norm(self.head_width, exists=config.qk_norm, epsilon=HEAD_EPSILON)
        self.down = nn.Linear((1 + RATIO) * width, width)
        self.kernel: Kernel = see_all

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor,
        turn: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As `Double.forward`."""
        shift, scale, gate = _vectors(self.modulation, condition)
        up = self.up(modulated_norm(tokens, shift, scale))
        qkv, hidden = up.split((3 * self.width, RATIO * self.width), dim=-1)
        query, key, value = split_heads(qkv, self.head_width)
        query, key = self.query_norm(query), self.key_norm(key)
        mixed = attend(self.kernel, query, key, value, turn, mask)
        update = self.down(torch.cat((mixed, F.gelu(hidden, approximate="tanh")), dim=-1))
        return gated_residual(tokens, gate, update)

    def division(self) -> Division:
        width = self.width
        return Division(
            layers={
                "up": Linear("column", (width, width, width, RATIO * width)),
                "down": Linear("row", (width, RATIO * width)),
            },
            enters=("up",),
            attributes=("width",),
            shared=("query_norm", "key_norm"),
            divisible={"heads": width // self.head_width},
        )


def _vectors(modulation: nn.Module, condition: Tensor) -> tuple[Tensor, ...]:
    """(batch, width) -> shift, scale, gate, ... (batch, 1, width) each."""
    vectors: Tensor = modulation(condition).unsqueeze(1)
    parts: tuple[Tensor, ...] = vectors.split(condition.shape[-1], dim=-1)
    return parts
