"""DiT / SiT: a transformer over image patches, conditioned on time and class by adaptive norms.

Peebles and Xie, Scalable Diffusion Models with Transformers (2023), the adaLN-Zero variant; Ma et
al., SiT (2024) trains the same network by flow matching. A fresh network is the zero function and
each of its blocks the identity, because the modulations and the last layer start at zero.

Its options make it LightningDiT (Yao et al. 2025: RMS norms, SwiGLU, rotary positions) and the
network of REPA (Yu et al. 2024: a projector of hidden states beside the prediction).

It is cut by data: `blocks` is its repeated part, called as `block(x, condition, turn)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Rule
from flows.models.adaln import TimeKind, adaln_zero, block_region, told_time
from flows.models.attention import Attention
from flows.models.chain import Chain, Link, Stream, Told
from flows.models.division import Region
from flows.models.embeddings import (
    TimeEmbedding,
    mean_of_rows,
    patchify,
    sincos_positions,
    unpatchify,
)
from flows.models.feedforward import (
    FeedForwardKind,
    Projector,
    feedforward_of,
    feedforward_products,
)
from flows.models.norms import (
    Modulation,
    NormKind,
    gated_residual,
    modulate,
    norm_of,
)
from flows.models.refusals import check_heads, check_patches, check_position_table
from flows.models.rotary import axial_turns, grid_places

Placement = Literal["pre", "peri", "post"]


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides the network's shape; the keys with a description are options.

    image_size: side of the square image (or latent) in pixels
    channels: channels of the image
    classes: classes without the null class, which is the label `classes`
    patch: side of a patch in pixels
    learn_sigma: the last layer gives two outputs a channel, as published; the second is unused
    text_width, text_tokens: of embedded captions, 0 for none
    """

    image_size: int
    channels: int
    classes: int
    patch: int
    width: int
    depth: int
    heads: int
    learn_sigma: bool = False
    norm: NormKind = field(
        default="layer",
        metadata={"description": "layer: mean and variance; rms; dyt: tanh, no statistics"},
    )
    norm_affine: bool = field(
        default=False, metadata={"description": "norms of tokens have weights of their own"}
    )
    norm_placement: Placement = field(
        default="pre",
        metadata={"description": "pre: of the input; peri: of the update too; post: of the sum"},
    )
    qk_norm: bool = field(
        default=False, metadata={"description": "RMS norm of the queries and keys of each head"}
    )
    rope: bool = field(
        default=False, metadata={"description": "queries and keys also turn by row and column"}
    )
    feedforward: FeedForwardKind = field(
        default="gelu", metadata={"description": "gelu, or swiglu at the same cost"}
    )
    wo_shift: bool = field(
        default=False, metadata={"description": "the condition scales and gates without a shift"}
    )
    align_depth: int = field(
        default=0,
        metadata={"description": "REPA: aligns the state after this many blocks", "minimum": 0},
    )
    align_width: int = field(
        default=0, metadata={"description": "REPA: width of the features to align", "minimum": 0}
    )
    align_hidden: int = field(
        default=2048, metadata={"description": "REPA: hidden width of the projector"}
    )
    time: TimeKind = field(
        default="flow",
        metadata={
            "description": "what the network is told: flow (t), reversed (1 - t; REPA), steps "
            "(999 to 0; DiT)"
        },
    )
    text_width: int = 0
    text_tokens: int = 0

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch)
        check_heads(self.width, self.heads)
        check_position_table(self.width)
        if self.rope and self.width // self.heads % 4:
            raise UserError(
                f"model.rope turns pairs of features by row and by column, so that the width of a head, "
                f"now model.width / model.heads = {self.width // self.heads}, must be divisible by 4."
            )
        if self.align_depth > self.depth:
            raise UserError(
                f"model.align_depth = {self.align_depth} is deeper than model.depth = {self.depth}; "
                f"align the hidden state after at most {self.depth} blocks."
            )
        if (self.align_depth > 0) != (self.align_width > 0):
            raise UserError(
                f"model.align_depth = {self.align_depth} and model.align_width = {self.align_width}: "
                "give both, the block and the width of the features to align it with, or neither."
            )

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2

    @property
    def outputs(self) -> int:
        """Channels of the last layer, the unused ones included."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def modulations(self) -> int:
        """Vectors that the condition gives a block."""
        return 4 if self.wo_shift else 6


class Aligned(NamedTuple):
    """What a network with a projector gives while it trains.

    prediction: (batch, channels, image_size, image_size)
    projection: (batch, tokens, align_width) of the hidden states after block `align_depth`
    """

    prediction: Tensor
    projection: Tensor


class Block(nn.Module):
    """Attention and feed-forward; the condition shifts, scales and gates them.

    With a norm placed `peri` each of them is normalised once more before it is added (Kim et al.
    2025, Peri-LN); `post` normalises the sum instead of the input (Vaswani et al. 2017).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, placement = config.width, config.norm_placement
        self.modulation = nn.Linear(width, config.modulations * width)
        self.attention = Attention(
            width,
            config.heads,
            qk_norm=config.qk_norm,
            key_bias_learns=config.qk_norm or config.rope,
        )
        self.feedforward = feedforward_of(config.feedforward, width)

        def norm(exists: bool) -> nn.Module:
            if not exists:
                return nn.Identity()
            return norm_of(config.norm, width, affine=config.norm_affine)

        pre, peri, post = placement != "post", placement == "peri", placement == "post"
        self.norm_1, self.norm_2 = norm(pre), norm(pre)
        self.update_norm_1, self.update_norm_2 = norm(peri), norm(peri)
        self.sum_norm_1, self.sum_norm_2 = norm(post), norm(post)

    def forward(self, x: Tensor, condition: Tensor, turn: Tensor | None = None) -> Tensor:
        """x (batch, tokens, width), condition (batch, width) -> (batch, tokens, width).

        The condition has been through its SiLU, which all blocks share.
        turn: (2, tokens, head width / 2) of the rotary positions, if there are any
        """
        first, second = self._modulations(condition)
        update = self.attention(modulate(self.norm_1(x), first.shift, first.scale), turn)
        x = self.sum_norm_1(gated_residual(x, first.gate, self.update_norm_1(update)))
        update = self.feedforward(modulate(self.norm_2(x), second.shift, second.scale))
        result: Tensor = self.sum_norm_2(gated_residual(x, second.gate, self.update_norm_2(update)))
        return result

    def _modulations(self, condition: Tensor) -> tuple[Modulation, Modulation]:
        """Of attention and of the feed-forward, each in the order shift, scale, gate."""
        parts = self.modulation(condition).unsqueeze(1).split(condition.shape[-1], dim=-1)
        if len(parts) == 4:
            return Modulation(None, *parts[:2]), Modulation(None, *parts[2:])
        return Modulation(*parts[:3]), Modulation(*parts[3:])


class Final(nn.Module):
    """From tokens to the features of their patches."""

    def __init__(self, width: int, features: int, norm: nn.Module) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.norm = norm
        self.out = nn.Linear(width, features)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(batch, tokens, width), (batch, width) -> (batch, tokens, features)."""
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        features: Tensor = self.out(modulate(self.norm(x), shift, scale))
        return features


class DiT(nn.Module):
    """The network v(x, t, label, text); deterministic, and computed in the dtype of its weights.

    Tables of positions are buffers that checkpoints leave out: `reset_buffers` computes them.
    Weights come from `flows.initialise.initialise`, by the rules of `init_rules`.
    """

    position: Tensor
    turn: Tensor | None

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, pairs = config.width, config.width // config.heads // 2
        self.patches = nn.Linear(config.patch**2 * config.channels, width)
        self.time = TimeEmbedding(width)
        self.label = nn.Embedding(config.classes + 1, width)
        self.text = nn.Linear(config.text_width, width) if config.text_width else None
        norm = partial(norm_of, config.norm, width, affine=config.norm_affine)
        self.embedding_norm = norm() if config.norm_placement == "peri" else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        aligned, features = config.align_depth > 0, config.align_width
        self.projector = Projector(width, config.align_hidden, features) if aligned else None
        self.final = Final(width, config.patch**2 * config.outputs, norm())
        self.register_buffer("position", torch.empty(config.tokens, width), persistent=False)
        turn = torch.empty(2, config.tokens, pairs) if config.rope else None
        self.register_buffer("turn", turn, persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the tables in place, wherever they lie; nothing to do on the meta device."""
        if self.position.is_meta:
            return
        config = self.config
        side = config.image_size // config.patch
        self.position.copy_(sincos_positions(side, config.width))
        if self.turn is not None:
            pairs = self.turn.shape[-1] // 2
            places = grid_places(side, torch.device("cpu"))
            self.turn.copy_(axial_turns(places, (pairs, pairs)))

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor, text: Tensor | None = None
    ) -> Tensor | Aligned:
        """Velocity (or whatever the objective makes of it) at x.

        x: (batch, channels, image_size, image_size)
        t: (batch,) flow time, 0 noise, 1 data; keep it in float32 under mixed precision
        label: (batch,) int64 class, `classes` for none
        text: (batch, tokens, text_width) embedded captions, where the network takes them: the mean of
            their rows joins the condition; rows of zeros are padding, a text of zeros is none
        returns (batch, channels, image_size, image_size), with the projection of hidden states in
        training mode if the network has a projector
        """
        condition = self._condition(t, label, text)
        tokens, projection = self._tokens(x), None
        for depth, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, condition, self.turn)
            if self.projector is not None and self.training and depth == self.config.align_depth:
                projection = self.projector(tokens)
        prediction = self._prediction(tokens, condition)
        return prediction if projection is None else Aligned(prediction, projection)

    def _tokens(self, x: Tensor) -> Tensor:
        """(batch, channels, image_size, image_size) -> (batch, tokens, width), positions added."""
        tokens = self.patches(patchify(x, self.config.patch).to(self.patches.weight.dtype))
        result: Tensor = self.embedding_norm(tokens + self.position.to(tokens.dtype))
        return result

    def _prediction(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """(batch, tokens, width), (batch, width) -> (batch, channels, image_size, image_size)."""
        config = self.config
        image = unpatchify(self.final(tokens, condition), config.patch, config.image_size)
        return image[:, : config.channels]

    def chain(self) -> Chain:
        """Its forward, cut between blocks; the condition is computed from t, label and text.

        Raises UserError for a network with a projector, whose hidden states come from the middle.
        """
        if self.projector is not None:
            raise UserError(
                f"model.align_depth = {self.config.align_depth} reads hidden states in the middle of the "
                "network, which no pipeline passes on; use parallel.pp=1, or model.align_depth=0."
            )

        def tell(inputs: Mapping[str, Tensor], _: int) -> Told:
            return {"condition": self._condition(inputs["t"], inputs["label"], inputs.get("text"))}

        def apply(number: int, stream: Stream, told: Told) -> Stream:
            return (self.blocks[number](stream[0], told["condition"], self.turn),)

        blocks = [
            Link(f"blocks.{number}", (f"blocks.{number}.",), partial(apply, number))
            for number in range(self.config.depth)
        ]
        return Chain(
            links=(
                Link(
                    "patches", ("patches.", "embedding_norm."), lambda s, _: (self._tokens(s[0]),)
                ),
                *blocks,
                Link(
                    "final",
                    ("final.",),
                    lambda s, told: (self._prediction(s[0], told["condition"]),),
                ),
            ),
            tell=tell,
            tells=("time.", "label.", "text."),
            end=lambda stream: stream[0],
            borders=tuple(range(len(blocks) + 2)),
        )

    def _condition(self, t: Tensor, label: Tensor, text: Tensor | None) -> Tensor:
        """(batch, width) the sum of all that conditions, through the SiLU that all blocks share."""
        time = self.time(told_time(t, self.config.time))
        # The cast is for bfloat16: label rows gathered in it and rows rounded here are the same.
        total = time + self.label(label).to(time.dtype)
        if self.text is not None:
            if text is None:
                raise ValueError("the network takes a text with every sample; zeros are no text")
            total = total + self.text(mean_of_rows(text).to(self.text.weight.dtype))
        return F.silu(total)

    def regions(self) -> list[Region]:
        """Where tokens may be divided: blocks, last layer and projector."""
        after = ("final",) if self.projector is None else ("final", "projector")
        config = self.config
        parts = {"(data.image_size / model.patch)^2": config.tokens}
        return [block_region(config.depth, after, parts, config.heads)]

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        return {
            name: adaln_zero(name, weight.shape, embeddings=("time.", "label."))
            for name, weight in self.named_parameters()
        }


def parameter_count(model: DiT, trainable_only: bool) -> int:
    """Numbers in the model; published totals also count the frozen position table."""
    trainable = sum(weight.numel() for weight in model.parameters())
    return trainable if trainable_only else trainable + model.position.numel()


def forward_flops(config: DiTConfig) -> int:
    """Floating point operations of the forward of one sample, two for each multiply-add.

    Matrix products alone, attention included, as in training: with the projector if there is one.
    Published "GFLOPs" of these models are half of this.
    """
    tokens, width = config.tokens, config.width
    pixels = config.patch**2
    conditioning = (TimeEmbedding.features + width + config.text_width) * width
    modulations = (config.modulations * config.depth + 2) * width**2
    projections = tokens * (4 * width**2 + feedforward_products(config.feedforward, width))
    attention = 2 * tokens**2 * width
    ends = tokens * width * pixels * (config.channels + config.outputs)
    projector = 0
    if config.align_depth:
        hidden = config.align_hidden
        projector = tokens * hidden * (width + hidden + config.align_width)
    blocks = config.depth * (projections + attention)
    return 2 * (conditioning + modulations + blocks + ends + projector)
