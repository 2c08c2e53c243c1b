"""Jet, from data to the prior. Names as JAX prints them: ['couplings']['dnn']..."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import State, attend, join_heads

CHANNEL = "['channel_coupling_masks-FREEZE_ME']"
SPATIAL = "['spatial_coupling_masks-FREEZE_ME']"
ATTENTION = "MultiHeadDotProductAttention_0"


def name(*keys: str) -> str:
    return "".join(f"['{key}']" for key in ("couplings", "dnn", *keys))


def shapes(
    *, couplings: int, layers: int, width: int, heads: int, features: int, tokens: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file, but those of the two stacks of masks."""

    def dense(inputs: int, outputs: int, *keys: str) -> dict[str, tuple[int, ...]]:
        return {
            name(*keys, "kernel"): (couplings, inputs, outputs),
            name(*keys, "bias"): (couplings, outputs),
        }

    found = {
        name("posemb"): (couplings, 1, tokens, width),
        **dense(features // 2, width, "init_proj"),
        **dense(width, features, "final_proj"),
        name("vit", "encoder_norm", "scale"): (couplings, width),
        name("vit", "encoder_norm", "bias"): (couplings, width),
    }
    head = (heads, width // heads)
    for layer in (("vit", f"encoderblock_{index}") for index in range(layers)):
        for part in ("scale", "bias"):
            found[name(*layer, "LayerNorm_0", part)] = (couplings, width)
            found[name(*layer, "LayerNorm_1", part)] = (couplings, width)
        found |= dense(width, 4 * width, *layer, "MlpBlock_0", "Dense_0")
        found |= dense(4 * width, width, *layer, "MlpBlock_0", "Dense_1")
        for part in ("query", "key", "value"):
            found[name(*layer, ATTENTION, part, "kernel")] = (couplings, width, *head)
            found[name(*layer, ATTENTION, part, "bias")] = (couplings, *head)
        found[name(*layer, ATTENTION, "out", "kernel")] = (couplings, *head, width)
        found[name(*layer, ATTENTION, "out", "bias")] = (couplings, width)
    return found


def forward(state: State, x: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Images (batch, channels, side, side) -> z (batch, tokens, features) and log-determinant."""
    batch, channels, side, _ = x.shape
    grid = x.reshape(batch, channels, side // patch, patch, side // patch, patch)
    x = torch.einsum("bchpwq->bhwpqc", grid).reshape(batch, (side // patch) ** 2, -1)
    logdet = torch.zeros(batch)
    for index in range(len(state[CHANNEL])):
        one = {key: value[index] for key, value in state.items()}
        x, change = coupling(one, x)
        logdet = logdet + change
    return x, logdet


def coupling(one: State, x: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, c = x.shape
    spatial = not one[CHANNEL].any()
    if spatial:
        x = torch.einsum("btk,tm->bmk", x, one[SPATIAL])
        first, second = (half.reshape(batch, n, c // 2) for half in x.chunk(2, 1))
    else:
        first, second = (x @ one[CHANNEL]).chunk(2, -1)
    bias, raw = network(one, first).chunk(2, -1)
    second = (second + bias) * 2 * raw.sigmoid()
    logdet = (2 * raw.sigmoid()).log().sum((1, 2))
    if spatial:
        halves = [half.reshape(batch, n // 2, c) for half in (first, second)]
        return torch.einsum("btk,mt->bmk", torch.cat(halves, 1), one[SPATIAL]), logdet
    return torch.cat((first, second), -1) @ one[CHANNEL].T, logdet


def network(one: State, h: Tensor) -> Tensor:
    h = dense(one, h, "init_proj") + one[name("posemb")]
    layer = 0
    while name("vit", f"encoderblock_{layer}", "LayerNorm_0", "scale") in one:
        block = ("vit", f"encoderblock_{layer}")
        h = h + attention(one, norm(one, h, *block, "LayerNorm_0"), *block, ATTENTION)
        hidden = dense(one, norm(one, h, *block, "LayerNorm_1"), *block, "MlpBlock_0", "Dense_0")
        h = h + dense(one, F.gelu(hidden, approximate="tanh"), *block, "MlpBlock_0", "Dense_1")
        layer += 1
    return dense(one, norm(one, h, "vit", "encoder_norm"), "final_proj")


def attention(one: State, h: Tensor, *keys: str) -> Tensor:
    q, k, v = (
        torch.einsum("btw,whd->bhtd", h, one[name(*keys, part, "kernel")])
        + one[name(*keys, part, "bias")][:, None]
        for part in ("query", "key", "value")
    )
    kernel = one[name(*keys, "out", "kernel")].flatten(0, 1)
    return join_heads(attend(q, k, v)) @ kernel + one[name(*keys, "out", "bias")]


def dense(one: State, h: Tensor, *keys: str) -> Tensor:
    return h @ one[name(*keys, "kernel")] + one[name(*keys, "bias")]


def norm(one: State, h: Tensor, *keys: str) -> Tensor:
    scale = one[name(*keys, "scale")]
    return F.layer_norm(h, scale.shape, scale, one[name(*keys, "bias")], 1e-6)
