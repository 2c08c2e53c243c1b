"""DiT / SiT: a transformer over image patches, conditioned on time and class by adaptive norms.

Peebles and Xie, Scalable Diffusion Models with Transformers (2023), the adaLN-Zero variant; Ma et
al., SiT (2024) trains the same network by flow matching. A fresh network is the zero function and
each of its blocks the identity, because the modulations and the last layer start at zero.

It is cut by data: `blocks` is its repeated part, called as `block(x, condition)`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Rule, xavier_uniform
from flows.models.attention import Attention
from flows.models.embeddings import TimeEmbedding, patchify, sincos_positions, unpatchify
from flows.models.feedforward import RATIO, FeedForward
from flows.models.norms import gated_residual, modulated_norm

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides the network's shape.

    image_size: side of the square image (or latent) in pixels
    channels: channels of the image
    classes: classes without the null class, which is the label `classes`
    patch: side of a patch in pixels
    learn_sigma: the last layer gives two outputs a channel, as published; the second is unused
    """

    image_size: int
    channels: int
    classes: int
    patch: int
    width: int
    depth: int
    heads: int
    learn_sigma: bool = False

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise UserError(
                f"data.image_size = {self.image_size} is not divisible by "
                f"model.patch = {self.patch}; use a patch of {_one_of(_divisors(self.image_size))}."
            )
        if self.width % self.heads:
            raise UserError(
                f"model.width = {self.width} is not divisible by model.heads = {self.heads}; "
                f"use {_one_of(_divisors(self.width))} heads."
            )
        if self.width % 4:
            raise UserError(
                f"model.width = {self.width} is not divisible by 4, as the position table needs; "
                f"use {self.width // 4 * 4 + 4}."
            )

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def outputs(self) -> int:
        """Channels of the last layer, the unused ones included."""
        return self.channels * (2 if self.learn_sigma else 1)


class Block(nn.Module):
    """Attention and feed-forward; the condition shifts, scales and gates them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads)
        self.feedforward = FeedForward(width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (batch, tokens, width), condition (batch, width) -> (batch, tokens, width).

        The condition has been through its SiLU, which all blocks share.
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
            self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        )
        x = gated_residual(x, gate_1, self.attention(modulated_norm(x, shift_1, scale_1)))
        return gated_residual(x, gate_2, self.feedforward(modulated_norm(x, shift_2, scale_2)))


class Final(nn.Module):
    """From tokens to the features of their patches."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, features)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(batch, tokens, width), (batch, width) -> (batch, tokens, features)."""
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        features: Tensor = self.out(modulated_norm(x, shift, scale))
        return features


class DiT(nn.Module):
    """The network v(x, t, label); deterministic, and computed in the dtype of its weights.

    The frozen position table is a buffer that checkpoints leave out: `reset_buffers` computes it.
    Weights come from `flows.initialise.initialise`, by the rules of `init_rules`.
    """

    position: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patches = nn.Linear(config.patch**2 * config.channels, width)
        self.time = TimeEmbedding(width)
        self.label = nn.Embedding(config.classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final = Final(width, config.patch**2 * config.outputs)
        self.register_buffer("position", torch.empty(config.tokens, width), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the position table in place, wherever it lies; nothing to do on the meta device."""
        if self.position.is_meta:
            return
        side = self.config.image_size // self.config.patch
        self.position.copy_(sincos_positions(side, self.config.width))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Velocity (or whatever the objective makes of it) at x.

        x: (batch, channels, image_size, image_size)
        t: (batch,) flow time, 0 noise, 1 data; keep it in float32 under mixed precision
        label: (batch,) int64 class, `classes` for none
        returns (batch, channels, image_size, image_size)
        """
        config = self.config
        time = self.time(t)
        # The cast is for bfloat16: label rows gathered in it and rows rounded here are the same.
        condition = F.silu(time + self.label(label).to(time.dtype))
        tokens = self.patches(patchify(x, config.patch).to(self.patches.weight.dtype))
        tokens = tokens + self.position.to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, condition)
        image = unpatchify(self.final(tokens, condition), config.patch, config.image_size)
        return image[:, : config.channels]

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        return {name: _init_rule(name, weight.shape) for name, weight in self.named_parameters()}


def _init_rule(name: str, shape: torch.Size) -> Rule:
    """adaLN-Zero: modulations and last layer zero, embeddings normal, all other weights Xavier."""
    if name.endswith("bias") or ".modulation." in name or name.startswith("final."):
        return Rule.constant(0.0)
    if name.startswith(("time.", "label.")):
        return Rule.normal(EMBEDDING_STD)
    outputs, inputs = shape
    return xavier_uniform(inputs, outputs)


def parameter_count(model: DiT, trainable_only: bool) -> int:
    """Numbers in the model; published totals also count the frozen position table."""
    trainable = sum(weight.numel() for weight in model.parameters())
    return trainable if trainable_only else trainable + model.position.numel()


def forward_flops(config: DiTConfig) -> int:
    """Floating point operations of the forward of one sample, two for each multiply-add.

    Matrix products alone, attention included; published "GFLOPs" of these models are half of this.
    """
    tokens, width = config.tokens, config.width
    pixels = config.patch**2
    conditioning = TimeEmbedding.features * width + width**2
    modulations = (6 * config.depth + 2) * width**2
    projections = tokens * (4 + 2 * RATIO) * width**2
    attention = 2 * tokens**2 * width
    ends = tokens * width * pixels * (config.channels + config.outputs)
    return 2 * (conditioning + modulations + config.depth * (projections + attention) + ends)


def train_flops(config: DiTConfig) -> int:
    """Operations of forward and backward of one sample; recomputed activations are not counted."""
    return 3 * forward_flops(config)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _one_of(numbers: list[int]) -> str:
    return (
        ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if numbers[1:] else str(numbers[0])
    )
