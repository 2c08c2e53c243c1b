"""Causal transformer layers: token i sees tokens 0 ... i, and a cache remembers what it saw.

Shared by TarFlow and STARFlow. Training runs `layer(x, turn)` over whole sequences with the fused
causal kernel, so no mask exists. Sampling passes a `KeyValue` per layer, whose buffers are made once
for the longest sequence: new tokens are written behind the old ones, and nothing is concatenated.
"""

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flows.errors import UserError
from flows.models.attention import Kernel, QueryKeyValue, see_before
from flows.models.division import Division, Linear
from flows.models.feedforward import RATIO, feedforward_division
from flows.models.norms import DynamicTanh, RMSNorm
from flows.models.rotary import rotate

# Rows of a product with weights on a CPU for which W x^T is faster than x W^T, by up to a half:
# `flowmill bench sampling` at batch 16.
FEW_ROWS = range(12, 64)

NormKind = Literal["layer", "rms", "dyt"]
# Where a sub-layer F has its norms N, M. pre: x + F(N(x)); peri: x + M(F(N(x))), Kim et al. 2025,
# "Peri-LN" (STARFlow's post-norms); post: N(x + F(x)), Vaswani et al. 2017.
Placement = Literal["pre", "peri", "post"]

LAYER_NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class LayerShape:
    """Everything that decides the shape of one layer.

    kv_heads: heads of keys and values, each shared by heads / kv_heads query heads
    bias: of the projections in attention and feed-forward
    gated: down(gelu(gate x) * up x) instead of down(gelu(up x))
    turned: queries and keys are rotated by their positions
    """

    width: int
    head_width: int
    kv_heads: int
    bias: bool
    qk_norm: bool
    gated: bool
    turned: bool
    norm: NormKind
    placement: Placement

    def __post_init__(self) -> None:
        if self.width % self.head_width:
            raise UserError(
                f"model.width = {self.width} is not a multiple of "
                f"model.head_width = {self.head_width}; use a head width that divides it."
            )
        if self.heads % self.kv_heads:
            raise UserError(
                f"model.kv_heads = {self.kv_heads} does not divide the {self.heads} heads that "
                "model.width / model.head_width gives; use a divisor, or 0 for as many as heads."
            )

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def token_products(self) -> int:
        """Multiply-adds of the weights of one layer for one token."""
        projections = self.width * (2 * self.width + 2 * self.key_width)
        return projections + (3 if self.gated else 2) * RATIO * self.width**2


class KeyValue:
    """Keys and values of one layer for the tokens so far, in buffers for `capacity` tokens.

    length: tokens that count; setting it lower forgets the later ones
    sharpness: (batch, 1, 1, 1) factor on the logits of each sample, None for 1 (an attention
        temperature is its inverse)
    """

    def __init__(
        self, shape: LayerShape, batch: int, capacity: int, like: Tensor, sharpness: Tensor | None
    ) -> None:
        size = (batch, shape.kv_heads, capacity, shape.head_width)
        self.keys, self.values = like.new_empty(size), like.new_empty(size)
        self.sharpness = sharpness
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, kv_heads, new, head_width) twice -> all keys and values so far, as views."""
        new, end = key.shape[2], self.length + key.shape[2]
        self.keys.narrow(2, self.length, new).copy_(key)
        self.values.narrow(2, self.length, new).copy_(value)
        self.length = end
        return self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)


class CausalAttention(nn.Module):
    """Softmax attention over the tokens up to each one, scaled by 1 / sqrt(head_width)."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        self.sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
        self.grouped = shape.heads != shape.kv_heads
        outputs = shape.width + 2 * shape.key_width
        # Rotation and norm make the key bias matter; without them its true gradient is zero.
        cut = shape.bias and not (shape.turned or shape.qk_norm)
        self.qkv = (
            QueryKeyValue(shape.width, shape.key_width)
            if cut
            else nn.Linear(shape.width, outputs, bias=shape.bias)
        )
        self.query_norm = RMSNorm(shape.head_width, offset=1.0) if shape.qk_norm else None
        self.key_norm = RMSNorm(shape.head_width, offset=1.0) if shape.qk_norm else None
        self.out = nn.Linear(shape.width, shape.width, bias=shape.bias)
        self.kernel: Kernel = see_before  # of whole sequences; sampling has a cache instead

    def forward(self, x: Tensor, turn: Tensor | None, cache: KeyValue | None) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width); see `CausalLayer.forward`."""
        # Split before transposing: the three gradients are then joined in the layout of `qkv`.
        heads = project(self.qkv, x).unflatten(-1, (-1, self.head_width)).split(self.sizes, dim=2)
        query, key, value = (part.transpose(1, 2) for part in heads)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        if cache is None:
            mixed = self.kernel(query, key, value, None)
        else:
            mixed = self._attend(query, key, value, cache)
        return project(self.out, mixed.transpose(1, 2).flatten(2))

    def division(self) -> Division:
        width, (heads, kv_heads, _) = self.out.out_features, self.sizes
        key_width = kv_heads * self.head_width
        return Division(
            layers={
                "qkv": Linear("column", (width, key_width, key_width)),
                "out": Linear("row", (width,)),
            },
            enters=("",),
            attributes=("sizes",),
            shared=("query_norm", "key_norm"),
            divisible={"heads": heads, "heads of keys and values": kv_heads},
        )

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValue) -> Tensor:
        """The new tokens see all that the cache holds and each other, causally."""
        new, before = query.shape[2], cache.length
        keys, values = cache.append(key, value)
        # The fused kernel wants features side by side.
        query = query.contiguous() if cache.sharpness is None else query * cache.sharpness
        mask = None
        if new > 1 and before > 0:
            mask = torch.ones(new, before + new, dtype=torch.bool, device=query.device).tril(before)
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=mask,
            is_causal=new > 1 and before == 0,
            enable_gqa=self.grouped,
        )


class Plain(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, RATIO * shape.width, bias=shape.bias)
        self.down = nn.Linear(RATIO * shape.width, shape.width, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        return project(self.down, F.gelu(project(self.up, x)))

    def division(self) -> Division:
        return feedforward_division(self.down.in_features, up=1)


class Gated(nn.Module):
    """down(gelu(gate x) * up x) with the tanh-approximated GELU (Shazeer 2020, "GEGLU")."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, RATIO * shape.width, bias=shape.bias)
        self.up = nn.Linear(shape.width, RATIO * shape.width, bias=shape.bias)
        self.down = nn.Linear(RATIO * shape.width, shape.width, bias=shape.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        gate = F.gelu(project(self.gate, x), approximate="tanh")
        return project(self.down, gate * project(self.up, x))

    def division(self) -> Division:
        hidden = self.down.in_features
        plain = feedforward_division(hidden, up=1)
        return replace(plain, layers={**plain.layers, "gate": Linear("column", (hidden,))})


class SubLayer(nn.Module):
    """A residual branch with its norms, see `Placement`."""

    def __init__(self, inner: nn.Module, shape: LayerShape) -> None:
        super().__init__()
        self.inner = inner
        self.last = shape.placement == "post"
        self.norm = make_norm(shape.norm, shape.width)
        self.out_norm = (
            make_norm("dyt" if shape.norm == "dyt" else "rms", shape.width)
            if shape.placement == "peri"
            else None
        )

    def forward(self, x: Tensor, *rest: Tensor | KeyValue | None) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width)."""
        if self.last:
            normed: Tensor = self.norm(x + self.inner(x, *rest))
            return normed
        update: Tensor = self.inner(self.norm(x), *rest)
        return x + (update if self.out_norm is None else self.out_norm(update))


class CausalLayer(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.attention = SubLayer(CausalAttention(shape), shape)
        self.feedforward = SubLayer((Gated if shape.gated else Plain)(shape), shape)

    def forward(
        self, x: Tensor, turn: Tensor | None = None, cache: KeyValue | None = None
    ) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, width).

        turn: (2, tokens, head_width / 2) cosines and sines of the tokens' positions
        cache: tokens before these, to which these are added; None: there are none
        """
        x = self.attention(x, turn, cache)
        result: Tensor = self.feedforward(x)
        return result


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)`, (..., inputs) -> (..., outputs); while sampling, in whatever form is fastest."""
    # A layer of which there is more to know than its weights is called.
    if (
        torch.compiler.is_compiling()
        or not torch.is_inference_mode_enabled()
        or type(linear) not in (nn.Linear, QueryKeyValue)
    ):
        result: Tensor = linear(x)
        return result
    rows, bias = x.shape[:-1], cast(Tensor | None, linear.bias)
    if x.device.type != "cpu" or rows.numel() not in FEW_ROWS:
        return F.linear(x, linear.weight, bias)
    columns = x.reshape(-1, x.shape[-1]).t()
    product: Tensor
    if bias is None:
        product = torch.mm(linear.weight, columns)
    else:
        product = torch.addmm(bias[:, None], linear.weight, columns)
    return product.t().view(*rows, -1)


def make_norm(kind: NormKind, width: int) -> nn.Module:
    """A norm over the width with a gain (and, for `layer` and `dyt`, a bias) for each feature."""
    if kind == "layer":
        return nn.LayerNorm(width, eps=LAYER_NORM_EPSILON)
    return RMSNorm(width, offset=1.0) if kind == "rms" else DynamicTanh(width)
