"""MMDiT: text and image tokens in one attention, each with weights of their own (SD3, FLUX).

Esser et al., Scaling Rectified Flow Transformers (2024), has double blocks alone: two streams that
meet in the attention, the last of which changes the image alone. Black Forest Labs' FLUX.1 (2024)
follows them with single blocks: one stream, attention and feed-forward side by side; it turns queries
and keys by (0, row, column), and by nothing for words, whose order is what their features say. A
fresh network is the zero function and its blocks the identity.

Time is embedded as 1000 times what the network is told. Published weights are told it from data to
noise (`time` = reversed) and predict noise - data: whoever loads them changes the sign of the last
layer, and reorders the features of patches from (channel, row, column) to (row, column, channel).

It is cut by data: `blocks` are all double blocks, then all single blocks, and each is called as
`block(tokens, condition, turn, mask)` on [text | image] tokens.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.initialise import Rule
from flows.models.adaln import adaln_zero, told_time
from flows.models.chain import Chain, Link, Stream, Told
from flows.models.dit import Final
from flows.models.division import Region
from flows.models.embeddings import (
    TimeEmbedding,
    VectorEmbedding,
    mean_of_rows,
    patchify,
    sincos_positions,
    unpatchify,
)
from flows.models.feedforward import RATIO
from flows.models.mmdit_blocks import Double, Single
from flows.models.mmdit_config import MMDiTConfig
from flows.models.norms import LayerNorm
from flows.models.rotary import axial_turns, grid_places

TIME_SCALE = 1000.0  # what times and strengths of guidance are multiplied by before their sinusoids

EMBEDDINGS = ("time.", "vector.", "pooled.", "guidance.", "label.")


class MMDiT(nn.Module):
    """The network v(x, t, text, ...); deterministic, and computed in the dtype of its weights.

    Tables of places are buffers that checkpoints leave out: `reset_buffers` computes them.
    Weights come from `flows.initialise.initialise`, by the rules of `init_rules`.
    """

    turn: Tensor | None
    position: Tensor | None

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width, features = config.width, config.patch**2 * config.channels
        self.patches = nn.Linear(features, width)
        self.words = nn.Linear(config.text_width, width)
        self.time = TimeEmbedding(width)
        widths = config.condition_widths
        self.vector = VectorEmbedding(widths["vector"], width) if "vector" in widths else None
        self.pooled = VectorEmbedding(widths["pooled"], width) if "pooled" in widths else None
        self.guidance = TimeEmbedding(width) if config.guidance else None
        self.label = nn.Embedding(config.classes + 1, width) if config.class_label else None
        singles = [Single(config) for _ in range(config.single_depth)]
        # Where no block follows, nobody reads the text any more.
        followed = [True] * (config.double_depth - 1) + [config.single_depth > 0]
        doubles = [Double(config, text_updated=updated) for updated in followed]
        self.blocks = nn.ModuleList([*doubles, *singles])
        self.final = Final(width, features, LayerNorm(width, affine=False))
        places = config.text_tokens + config.tokens
        turn = torch.empty(2, places, config.head_width // 2) if config.rope else None
        self.register_buffer("turn", turn, persistent=False)
        position = None if config.rope else torch.empty(config.tokens, width)
        self.register_buffer("position", position, persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the tables in place, wherever they lie; nothing to do on the meta device."""
        config = self.config
        side = config.image_size // config.patch
        if self.position is not None and not self.position.is_meta:
            self.position.copy_(sincos_positions(side, config.width))
        if self.turn is not None and not self.turn.is_meta:
            grid = grid_places(side, torch.device("cpu"))
            words = torch.zeros(config.text_tokens, dtype=torch.int64)
            row, column = (torch.cat((words, place)) for place in grid)
            self.turn.copy_(axial_turns((torch.zeros_like(row), row, column), config.pairs))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        text: Tensor | None = None,
        vector: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Velocity (or whatever the objective makes of it) at x.

        x: (batch, channels, image_size, image_size)
        t: (batch,) flow time, 0 noise, 1 data; keep it in float32 under mixed precision
        label: (batch,) int64 class, `classes` for none; networks without `class_label` ignore it
        text: (batch, text_tokens, text_width) embedded captions; rows of zeros are padding, a text of
            zeros is none
        vector: (batch, vector_width) of the caption, where the network takes one
        guidance: (batch,) strength told to the network, `guidance` of the configuration if None
        returns (batch, channels, image_size, image_size)
        Raises UserError for a network that needs a text or a vector and is given none.
        """
        text = self._text(text)
        condition = self._condition(t, label, text, vector, guidance)
        tokens, mask = self._tokens(x, text), self._mask(text)
        for block in self.blocks:
            tokens = block(tokens, condition, self.turn, mask)
        return self._prediction(tokens, condition)

    def chain(self) -> Chain:
        """Its forward, cut between blocks; the condition is computed from all inputs but the image."""

        def tell(inputs: Mapping[str, Tensor], _: int) -> Told:
            text = self._text(inputs.get("text"))
            others = (inputs.get(name) for name in ("vector", "guidance"))
            condition = self._condition(inputs["t"], inputs.get("label"), text, *others)
            return {"condition": condition, "text": text, "mask": self._mask(text)}

        def apply(number: int, stream: Stream, told: Told) -> Stream:
            block = self.blocks[number]
            return (block(stream[0], told["condition"], self.turn, told["mask"]),)

        blocks = [
            Link(f"blocks.{number}", (f"blocks.{number}.",), partial(apply, number))
            for number in range(len(self.blocks))
        ]
        return Chain(
            links=(
                Link(
                    "patches",
                    ("patches.", "words."),
                    lambda s, told: (self._tokens(s[0], told["text"]),),
                ),
                *blocks,
                Link(
                    "final",
                    ("final.",),
                    lambda s, told: (self._prediction(s[0], told["condition"]),),
                ),
            ),
            tell=tell,
            tells=EMBEDDINGS,
            end=lambda stream: stream[0],
            borders=tuple(range(len(blocks) + 2)),
        )

    def _tokens(self, x: Tensor, text: Tensor) -> Tensor:
        """(batch, text + image tokens, width), places added."""
        words = self.words(text.to(self.words.weight.dtype))
        tokens = self.patches(patchify(x, self.config.patch).to(self.patches.weight.dtype))
        if self.position is not None:
            tokens = tokens + self.position.to(tokens.dtype)
        return torch.cat((words, tokens), dim=1)

    def _prediction(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """[text | image] tokens -> (batch, channels, image_size, image_size)."""
        config = self.config
        features = self.final(tokens[:, config.text_tokens :], condition)
        return unpatchify(features, config.patch, config.image_size)

    def _text(self, text: Tensor | None) -> Tensor:
        """The text, if it is one that the blocks can split off."""
        tokens = self.config.text_tokens
        if text is None:
            raise UserError("an MMDiT takes a text with every sample; zeros are no text.")
        if text.shape[1] != tokens:
            raise UserError(
                f"the network was built for texts of {tokens} tokens and is given {text.shape[1]}; "
                "pad them with rows of zeros, or cut them."
            )
        return text

    def _mask(self, text: Tensor) -> Tensor | None:
        """(batch, 1, 1, tokens) bool, false for padding of the text; None where that is seen, too."""
        if not self.config.mask_text:
            return None
        seen = F.pad(text.any(-1), (0, self.config.tokens), value=True)
        return seen[:, None, None]

    def _condition(
        self,
        t: Tensor,
        label: Tensor | None,
        text: Tensor,
        vector: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """(batch, width) the sum of all that conditions, through the SiLU that all blocks share."""
        config = self.config
        total = self.time(TIME_SCALE * told_time(t, config.time))
        if self.vector is not None:
            if vector is None:
                raise UserError(
                    f"model.vector_width = {config.vector_width}: the network takes a vector with every "
                    "caption, and the data has none; use model.vector_width=0 model.pool_text=true."
                )
            total = total + self.vector(vector)
        if self.pooled is not None:
            total = total + self.pooled(mean_of_rows(text))
        if self.guidance is not None:
            told = torch.full_like(t, config.guidance) if guidance is None else guidance
            total = total + self.guidance(TIME_SCALE * told)
        if self.label is not None:
            none = torch.full_like(t, config.classes, dtype=torch.int64)
            # The cast is for bfloat16: label rows gathered in it and rows rounded here are the same.
            total = total + self.label(none if label is None else label).to(total.dtype)
        return F.silu(total)

    def regions(self) -> list[Region]:
        """Where tokens may be divided: all blocks, words and patches each by themselves."""
        config = self.config
        doubles = [f"blocks.{index}" for index in range(config.double_depth)]
        depth = config.double_depth + config.single_depth
        singles = [f"blocks.{index}" for index in range(config.double_depth, depth)]
        streams = {
            f"{name}.{own}": i for name in doubles for i, own in enumerate(("text", "image"))
        }
        blocks = (*doubles, *singles)
        return [
            Region(
                blocks=blocks,
                after=(),
                ends=blocks[-1:],
                vectors=tuple(f"{name}.modulation" for name in (*streams, *singles)),
                parts={
                    "data.text.tokens": config.text_tokens,
                    "(data.image_size / model.patch)^2": config.tokens,
                },
                heads={"model.heads": config.heads},
                part_of=streams,
                lengths={f"{name}.text_tokens": 0 for name in doubles},
            )
        ]

    def init_rules(self) -> dict[str, Rule]:
        """Parameter name -> how its first values are drawn."""
        return {
            name: adaln_zero(name, weight.shape, embeddings=EMBEDDINGS)
            for name, weight in self.named_parameters()
        }


def forward_flops(config: MMDiTConfig) -> int:
    """Floating point operations of the forward of one sample, two for each multiply-add.

    Matrix products alone, attention included, over padding of the text too.
    """
    width, tokens, words = config.width, config.tokens, config.text_tokens
    doubles, singles = config.double_depth, config.single_depth
    times = (2 if config.guidance else 1) * (TimeEmbedding.features + width)
    vectors = sum(features + width for features in config.condition_widths.values())
    modulations = (12 * doubles + 3 * singles + 2) * width
    ends = 2 * tokens * config.patch**2 * config.channels + words * config.text_width
    layers = (doubles + singles) * (tokens + words) * (4 + 2 * RATIO) * width
    attention = (doubles + singles) * 2 * (tokens + words) ** 2
    # The text of the last block has keys and values, and queries that are for nothing.
    saved = 0 if singles else (4 + words * (1 + 2 * RATIO)) * width
    return 2 * width * (times + vectors + modulations + ends + layers + attention - saved)
