"""The sizes and options of an MMDiT, see `flows.models.mmdit`."""

from dataclasses import dataclass, field
from typing import Literal

from flows.errors import UserError
from flows.models.refusals import check_heads, check_patches, check_position_table


@dataclass(frozen=True)
class MMDiTConfig:
    """Everything that decides the network's shape.

    image_size: side of the square image (or latent) in pixels
    channels: channels of the image
    classes: classes without the null class, which is the label `classes`
    text_width, text_tokens: of embedded captions
    patch: side of a patch in pixels
    """

    image_size: int
    channels: int
    classes: int
    text_width: int
    text_tokens: int
    patch: int
    width: int
    heads: int
    double_depth: int = field(metadata={"description": "blocks with two streams"})
    single_depth: int = field(
        default=0, metadata={"description": "blocks with one stream, after them", "minimum": 0}
    )
    qk_norm: bool = field(
        default=True, metadata={"description": "RMS norm of the queries and keys of each head"}
    )
    rope: bool = field(
        default=True,
        metadata={"description": "places turn queries and keys; false: a table is added"},
    )
    mask_text: bool = field(
        default=True,
        metadata={"description": "no token sees padding of the text; FLUX lets all see it"},
    )
    pool_text: bool = field(
        default=False, metadata={"description": "the mean of the text joins the condition"}
    )
    class_label: bool = field(
        default=False, metadata={"description": "the class joins the condition"}
    )
    vector_width: int = field(
        default=0,
        metadata={"description": "of a vector a caption that joins the condition", "minimum": 0},
    )
    guidance: float = field(
        default=0.0,
        metadata={"description": "strength told to networks distilled from guided ones; 0: no"},
    )
    time: Literal["flow", "reversed"] = field(
        default="flow",
        metadata={"description": "what the network is told: flow (t), reversed (1 - t; FLUX, SD3)"},
    )

    def __post_init__(self) -> None:
        check_patches(self.image_size, self.patch)
        check_heads(self.width, self.heads)
        if self.text_tokens < 1 or self.text_width < 1:
            raise UserError(
                "an MMDiT joins image and text tokens, and data.text is not given; name the embedded "
                "captions there, or choose another model.family, such as dit."
            )
        if self.rope and (self.head_width % 2 or self.head_width < 4):
            raise UserError(
                f"model.rope turns pairs of features by row and by column, so that the width of a head, "
                f"now model.width / model.heads = {self.head_width}, must be even and at least 4."
            )
        if not self.rope:
            check_position_table(self.width)

    @property
    def tokens(self) -> int:
        """Of the image."""
        return (self.image_size // self.patch) ** 2

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def pairs(self) -> tuple[int, int, int]:
        """Pairs of features of a head that turn by each coordinate.

        7/16 of them by row, as many by column, as near as can be: FLUX has (8, 28, 28).
        """
        side = max(7 * self.head_width // 32, 1)
        return self.head_width // 2 - 2 * side, side, side

    @property
    def condition_widths(self) -> dict[str, int]:
        """Vectors that join the time in the condition, and their widths."""
        widths = {"vector": self.vector_width, "pooled": self.text_width if self.pool_text else 0}
        return {name: width for name, width in widths.items() if width}
