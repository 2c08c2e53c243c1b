"""FLUX, with time from data to noise and the velocity noise - data."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import (
    State,
    attend,
    dense,
    frequencies,
    join_heads,
    plain_norm,
    rms_norm,
    sinusoid,
    split_heads,
    turn_pairs,
)

HEAD_EPSILON = 1e-5  # torchtitan's; Black Forest Labs have 1e-6


def shapes(
    *, width: int, head: int, features: int, context: int, vector: int, guidance: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file with two blocks of each kind."""

    def layer(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norms(name: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.norm.{part}_norm.weight": (head,) for part in ("query", "key")}

    found = {
        **layer("img_in", width, features),
        **layer("txt_in", width, context),
        **layer("final_layer.linear", features, width),
        **layer("final_layer.adaLN_modulation.1", 2 * width, width),
    }
    embedded = {"time_in": 256, "vector_in": vector} | ({"guidance_in": 256} if guidance else {})
    for name, inputs in embedded.items():
        found |= layer(f"{name}.in_layer", width, inputs) | layer(f"{name}.out_layer", width, width)
    for index in range(2):
        for part in ("img", "txt"):
            block = f"double_blocks.{index}.{part}"
            found |= layer(f"{block}_mod.lin", 6 * width, width)
            found |= layer(f"{block}_attn.qkv", 3 * width, width)
            found |= norms(f"{block}_attn")
            found |= layer(f"{block}_attn.proj", width, width)
            found |= layer(f"{block}_mlp.0", 4 * width, width)
            found |= layer(f"{block}_mlp.2", width, 4 * width)
        block = f"single_blocks.{index}"
        found |= layer(f"{block}.linear1", 7 * width, width)
        found |= layer(f"{block}.linear2", width, 5 * width)
        found |= norms(block)
        found |= layer(f"{block}.modulation.lin", 3 * width, width)
    return found


def pack(image: Tensor) -> Tensor:
    """Patches of 2 x 2 in raster order, features (channel, row, column)."""
    return F.unfold(image, 2, stride=2).mT


def unpack(tokens: Tensor, side: int) -> Tensor:
    return F.fold(tokens.mT, side, 2, stride=2)


def forward(
    state: State,
    image: Tensor,
    t: Tensor,
    text: Tensor,
    vector: Tensor,
    guidance: Tensor | None = None,
    *,
    heads: int,
    axes: tuple[int, int, int],
    head_epsilon: float = HEAD_EPSILON,
) -> Tensor:
    """Packed image tokens (batch, tokens, features) -> noise - data, like them."""
    x, words = dense(state, "img_in", image), dense(state, "txt_in", text)
    c = embed(state, "time_in", sinusoid(1000 * t)) + embed(state, "vector_in", vector)
    if guidance is not None:
        c = c + embed(state, "guidance_in", sinusoid(1000 * guidance))
    c = F.silu(c)
    angles = rotations(words.shape[1], round(x.shape[1] ** 0.5), axes)

    def mix(*parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = (torch.cat(same, 2) for same in zip(*parts, strict=True))
        return join_heads(attend(turn_pairs(q, angles), turn_pairs(k, angles), v))

    def heads_of(name: str, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, heads) for part in qkv.chunk(3, -1))
        gains = (state[f"{name}.norm.{part}_norm.weight"] for part in ("query", "key"))
        q, k = (rms_norm(p, gain, head_epsilon) for p, gain in zip((q, k), gains, strict=True))
        return q, k, v

    for index in range(2):
        streams = {"txt": words, "img": x}
        vectors = {
            part: dense(state, f"double_blocks.{index}.{part}_mod.lin", c)[:, None].chunk(6, -1)
            for part in streams
        }
        parts = [
            heads_of(
                f"double_blocks.{index}.{part}_attn",
                dense(
                    state,
                    f"double_blocks.{index}.{part}_attn.qkv",
                    plain_norm(h) * (1 + vectors[part][1]) + vectors[part][0],
                ),
            )
            for part, h in streams.items()
        ]
        mixed = mix(*parts).split((words.shape[1], x.shape[1]), 1)
        for (part, h), m in zip(streams.items(), mixed, strict=True):
            block = f"double_blocks.{index}.{part}"
            _, _, gate_1, shift, scale, gate_2 = vectors[part]
            h = h + gate_1 * dense(state, f"{block}_attn.proj", m)
            hidden = dense(state, f"{block}_mlp.0", plain_norm(h) * (1 + scale) + shift)
            h = h + gate_2 * dense(state, f"{block}_mlp.2", F.gelu(hidden, approximate="tanh"))
            streams[part] = h
        words, x = streams["txt"], streams["img"]
    both = torch.cat((words, x), 1)
    for index in range(2):
        block = f"single_blocks.{index}"
        shift, scale, gate = dense(state, f"{block}.modulation.lin", c)[:, None].chunk(3, -1)
        up = dense(state, f"{block}.linear1", plain_norm(both) * (1 + scale) + shift)
        qkv, hidden = up.split((3 * both.shape[-1], 4 * both.shape[-1]), -1)
        joined = torch.cat((mix(heads_of(block, qkv)), F.gelu(hidden, approximate="tanh")), -1)
        both = both + gate * dense(state, f"{block}.linear2", joined)
    x = both[:, words.shape[1] :]
    shift, scale = dense(state, "final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    return dense(state, "final_layer.linear", plain_norm(x) * (1 + scale) + shift)


def embed(state: State, name: str, x: Tensor) -> Tensor:
    return dense(state, f"{name}.out_layer", F.silu(dense(state, f"{name}.in_layer", x)))


def rotations(words: int, side: int, axes: tuple[int, int, int]) -> Tensor:
    """(words + tokens, head / 2) angles of (0, row, column); words are at 0 of all three."""
    place = torch.arange(side)
    ids = (torch.zeros(side**2), place.repeat_interleave(side), place.repeat(side))
    image = [one[:, None] * frequencies(size // 2) for one, size in zip(ids, axes, strict=True)]
    return torch.cat((torch.zeros(words, sum(axes) // 2), torch.cat(image, 1)))
