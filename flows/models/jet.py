"""Jet: a normalizing flow of affine couplings over image patches, whose networks are small ViTs.

Kolesnikov et al. 2024, "Jet: A Modern Transformer-Based Normalizing Flow". An image becomes tokens
x (n, c), and each coupling splits them into two halves (n, c / 2), of which one decides what becomes
of the other:

    (shift, raw) = network(x_1)
    x_2 <- (x_2 + shift) s,  s = 2 sigmoid(raw),  log |det| = sum log s

Halves are half of the features of every token, in an order drawn once for each coupling ("channel"),
or half of the tokens, by a pattern of the grid ("spatial"); there a token of c features is cut into
two of c / 2, so that the network always sees n tokens. Undoing a coupling costs as much as doing it.

A fresh Jet is the identity, because the last layer of each network starts at zero.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Rule
from flows.models.division import Region
from flows.models.embeddings import patchify, unpatchify
from flows.models.flow import FlowOutput
from flows.models.network import Network, init_rule, network_products, network_regions
from flows.randomness import Draw

Kind = Literal["channel", "spatial"]
Pattern = Literal[
    "checkerboard", "checkerboard-inv", "vstripes", "vstripes-inv", "hstripes", "hstripes-inv"
]

PATTERNS: tuple[Pattern, ...] = (
    "checkerboard",
    "checkerboard-inv",
    "vstripes",
    "vstripes-inv",
    "hstripes",
    "hstripes-inv",
)
KINDS: tuple[Kind, ...] = ("channel",) * 4 + ("spatial",)
LARGEST_SCALE = 2.0
# Of the orders of features, which are part of the architecture and not of a run.
ORDER_SEED = 0


@dataclass(frozen=True)
class JetConfig:
    """Everything that decides the network's shape.

    image_size: side of the square image (or latent) in pixels
    channels: channels of the image
    classes: the label `classes` means none
    conditional: the label is told to every coupling; else it is ignored
    patch: side of a patch in pixels
    couplings: how many; layers: transformer layers in the network of each
    kinds: of the couplings, repeated
    patterns: of the spatial couplings, repeated over those
    """

    image_size: int
    channels: int
    classes: int
    patch: int
    width: int
    couplings: int
    layers: int
    heads: int
    conditional: bool = False
    kinds: tuple[Kind, ...] = KINDS
    patterns: tuple[Pattern, ...] = PATTERNS

    def __post_init__(self) -> None:
        if self.image_size % self.patch:
            raise UserError(
                f"data.image_size = {self.image_size} is not divisible by model.patch = {self.patch}; "
                "use a patch that divides it."
            )
        if self.width % self.heads:
            raise UserError(
                f"model.width = {self.width} is not divisible by model.heads = {self.heads}; "
                "use a number of heads that divides it."
            )
        if self.features % 2:
            raise UserError(
                f"model.patch = {self.patch} makes tokens of {self.features} numbers, which have no "
                "halves; use an even patch."
            )
        if not self.kinds:
            raise UserError("model.kinds names no kind of coupling; use [channel, spatial].")
        if "spatial" in self.kinds and not self.patterns:
            raise UserError(
                "model.patterns is empty, and model.kinds has spatial couplings; "
                f"use some of {', '.join(PATTERNS)}."
            )
        if "spatial" in self.kinds and self.side % 2:
            raise UserError(
                f"model.patch = {self.patch} cuts data.image_size = {self.image_size} into "
                f"{self.side} x {self.side} tokens, of which no half can be taken; use a patch that "
                "makes an even grid, or model.kinds=[channel]."
            )

    @property
    def side(self) -> int:
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def features(self) -> int:
        return self.patch**2 * self.channels

    def coupling(self, index: int) -> tuple[Kind, Pattern | None]:
        """Kind of coupling `index`, and the pattern of a spatial one."""
        kind = self.kinds[index % len(self.kinds)]
        if kind == "channel":
            return kind, None
        before = sum(self.kinds[i % len(self.kinds)] == "spatial" for i in range(index))
        return kind, self.patterns[before % len(self.patterns)]


class Coupled(NamedTuple):
    """second: (batch, tokens, features / 2) the half as it became; logdet: (batch,)"""

    second: Tensor
    logdet: Tensor


def couple(second: Tensor, parameters: Tensor) -> Coupled:
    """(second + shift) s and sum log s, in float32, with parameters [shift | raw], s of raw."""
    shift, raw = parameters.float().chunk(2, dim=-1)
    logdet = (F.logsigmoid(raw) + math.log(LARGEST_SCALE)).flatten(1).sum(1)
    return Coupled((second + shift) * (LARGEST_SCALE * raw.sigmoid()), logdet)


def uncouple(second: Tensor, parameters: Tensor) -> Tensor:
    """The inverse of `couple`."""
    shift, raw = parameters.float().chunk(2, dim=-1)
    return second / (LARGEST_SCALE * raw.sigmoid()) - shift


class Jet(nn.Module):
    """The map from images to the prior, and back; all but the networks is computed in float32.

    The orders that couplings split by are buffers, which `reset_buffers` fills: those of tokens by
    the pattern, those of features by numbers drawn from (ORDER_SEED, index of the coupling).
    They are part of the state dictionary, because published checkpoints come with orders of their
    own. Weights come from `flows.initialise.initialise`, by the rules of `init_rules`.
    """

    def __init__(self, config: JetConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            Network(
                config.features // 2,
                config.features,
                tokens=config.tokens,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                conditional=config.conditional,
            )
            for _ in range(config.couplings)
        )
        self.label = nn.Embedding(config.classes + 1, config.width) if config.conditional else None
        for index in range(config.couplings):
            count = config.features if config.coupling(index)[0] == "channel" else config.tokens
            self.register_buffer(f"order_{index}", torch.empty(count, dtype=torch.int64))
        self.reset_buffers()

    def order(self, index: int) -> Tensor:
        """(features,) or (tokens,) int64 places that coupling `index` puts first, second, ..."""
        return self.get_buffer(f"order_{index}")

    def reset_buffers(self) -> None:
        """Fill the orders in place, wherever they lie; nothing to do on the meta device."""
        for index in range(self.config.couplings):
            order = self.order(index)
            if not order.is_meta:
                order.copy_(initial_order(self.config, index))

    def forward(self, x: Tensor, label: Tensor | None = None) -> FlowOutput:
        """x (batch, channels, image_size, image_size), label (batch,) int64 -> the prior's space."""
        x = patchify(x.float(), self.config.patch)
        embedded = self._embed(label, len(x))
        logdet, power = x.new_zeros(len(x)), x.square().flatten(1).mean(1)
        for index in range(self.config.couplings):
            first, second = self._split(index, x)
            second, change = couple(second, self.blocks[index](first, embedded))
            x, logdet = self._join(index, first, second), logdet + change
            if index < self.config.couplings - 1:
                power = power + x.square().flatten(1).mean(1)
        return FlowOutput(x, logdet, power)

    def inverse(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """z (batch, tokens, features) -> (batch, channels, image_size, image_size)."""
        x, embedded = z.float(), self._embed(label, len(z))
        for index in reversed(range(self.config.couplings)):
            first, second = self._split(index, x)
            second = uncouple(second, self.blocks[index](first, embedded))
            x = self._join(index, first, second)
        return unpatchify(x, self.config.patch, self.config.image_size)

    def _split(self, index: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, tokens, features) -> two halves (batch, tokens, features / 2)."""
        if self.config.coupling(index)[0] == "channel":
            first, second = put(x, 2, self.order(index).argsort()).chunk(2, dim=2)
            return first, second
        first, second = put(x, 1, self.order(index).argsort()).chunk(2, dim=1)
        shape = (len(x), self.config.tokens, self.config.features // 2)
        return first.reshape(shape), second.reshape(shape)

    def _join(self, index: int, first: Tensor, second: Tensor) -> Tensor:
        """The inverse of `_split`."""
        if self.config.coupling(index)[0] == "channel":
            return put(torch.cat((first, second), dim=2), 2, self.order(index))
        shape = (len(first), self.config.tokens // 2, self.config.features)
        both = torch.cat((first.reshape(shape), second.reshape(shape)), dim=1)
        return put(both, 1, self.order(index))

    def _embed(self, label: Tensor | None, count: int) -> Tensor | None:
        """(batch, width); no label at all is that of none."""
        if self.label is None:
            return None
        if label is None:
            label = self.label.weight.new_full((count,), self.config.classes, dtype=torch.int64)
        embedded: Tensor = self.label(label)
        return embedded

    def regions(self) -> list[Region]:
        """Where tokens may be divided: in the network of each coupling."""
        return network_regions(self.blocks, "model")

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        return {name: init_rule(name, weight.shape) for name, weight in self.named_parameters()}


def initial_order(config: JetConfig, index: int) -> Tensor:
    """(features,) or (tokens,) int64 on the CPU: which come first in coupling `index`, in order.

    Sorting is stable, so the tokens of a half keep their raster order.
    """
    kind, pattern = config.coupling(index)
    if kind == "channel":
        key = torch.tensor([index], device="cpu")
        return Draw(ORDER_SEED, 0, key).uniform("order", (config.features,))[0].argsort(stable=True)
    place = torch.arange(config.tokens, device="cpu")
    row, column = place // config.side, place % config.side
    name, _, inverted = (pattern or "").partition("-")
    later = {"checkerboard": row + column, "vstripes": column, "hstripes": row}[name]
    return ((later + bool(inverted)) % 2).argsort(stable=True)


def put(x: Tensor, dim: int, place: Tensor) -> Tensor:
    """Entry i along `dim` comes to place[i], a permutation; the same shape.

    Torch's own gradient of an indexing adds up what it scatters, which takes as long as sorting; that
    of a permutation is another one.
    """
    result: Tensor = _Put.apply(x, dim, place)
    return result


class _Put(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int, place: Tensor) -> Tensor:
        return torch.empty_like(x).index_copy(dim, place, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, Tensor], output: Tensor) -> None:  # noqa: ARG004
        _, ctx.dim, place = inputs
        ctx.save_for_backward(place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return put(gradient, ctx.dim, place.argsort()), None, None


def forward_flops(config: JetConfig) -> int:
    """Floating point operations of the forward of one sample, two for each multiply-add."""
    network = network_products(
        config.features // 2, config.features, config.tokens, config.width, config.layers
    )
    condition = config.width**2 if config.conditional else 0
    return 2 * config.couplings * (network + condition)


# Trained on 64 x 64 images; at any other size the position tables differ.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Jet-32x2": {"patch": 4, "width": 512, "couplings": 32, "layers": 2, "heads": 8},
    "Jet-64x5": {"patch": 4, "width": 512, "couplings": 64, "layers": 5, "heads": 8},
}
