"""FLUX, as Black Forest Labs and torchtitan write it.

It counts time from data to noise (`model.time` = reversed) and predicts noise - data, so that the last
layer changes its sign. The features of its patches are ordered (channel, row, column), of ours (row,
column, channel).
"""

from typing import Any

from torch import Tensor

from flows.errors import UserError
from flows.models.mmdit_config import MMDiTConfig
from flows.models.zoo import FAMILIES
from trainer.checkpoints.foreign.moves import Move, State, changed, linear, same
from trainer.checkpoints.foreign.source import (
    Contents,
    Findings,
    Source,
    Told,
    heads_of,
    unwrapped,
)

PATCH = 2
DISTILLED_GUIDANCE = 3.5  # what FLUX.1-dev is told unless somebody says otherwise
GUIDANCE = "guidance_in.in_layer.weight"


def renamed(state: State) -> State:
    """Norms of queries and keys have a `scale` at Black Forest Labs, and a `weight` at torchtitan."""
    return {
        name.removesuffix("scale") + "weight" if name.endswith("_norm.scale") else name: value
        for name, value in unwrapped(state).items()
    }


def read(contents: Contents, told: Told) -> Findings:
    width, features = contents.shape("img_in.weight", 2)
    patch = int(told.get("patch", PATCH))
    head = "double_blocks.0.img_attn.norm.query_norm.weight"
    found: dict[str, Any] = {
        "patch": patch,
        "channels": features // patch**2,
        "text_width": contents.shape("txt_in.weight", 2)[1],
        "width": width,
        "heads": heads_of(width, contents.shape(head, 1)[0], head),
        "double_depth": contents.count("double_blocks.{}.img_attn.qkv.weight"),
        "single_depth": contents.count("single_blocks.{}.linear1.weight"),
        "vector_width": contents.shape("vector_in.in_layer.weight", 2)[1],
        **FIXED,
    }
    usual: dict[str, Any] = {"classes": 1}
    if GUIDANCE in contents:
        usual["guidance"] = DISTILLED_GUIDANCE
    else:
        found["guidance"] = 0.0
    hints = {
        "image_size": "the side of the latents (128 for images of 1024 pixels)",
        "text_tokens": "the words of a text (512 for FLUX.1-dev, 256 for schnell)",
    }
    return Findings(found, usual, hints)


# What every model of the program is.
FIXED: dict[str, Any] = {
    "qk_norm": True,
    "rope": True,
    "mask_text": False,
    "pool_text": False,
    "class_label": False,
    "time": "reversed",
}


def moves(config: MMDiTConfig) -> list[Move]:
    first_single = config.double_depth
    guidance = embedding("guidance_in", "guidance") if config.guidance else []
    return [
        changed(
            "img_in.weight",
            "patches.weight",
            lambda w: _rows_first(w, config.patch),
            lambda w: _channels_first(w, config.patch),
        ),
        same("img_in.bias", "patches.bias"),
        *linear("txt_in", "words"),
        *embedding("time_in", "time"),
        *embedding("vector_in", "vector"),
        *guidance,
        *(move for index in range(first_single) for move in _double(index)),
        *(move for index in range(config.single_depth) for move in _single(index, first_single)),
        *_final(config.patch),
    ]


def embedding(theirs: str, ours: str) -> list[Move]:
    return [
        *linear(f"{theirs}.in_layer", f"{ours}.up"),
        *linear(f"{theirs}.out_layer", f"{ours}.out"),
    ]


def _double(index: int) -> list[Move]:
    found: list[Move] = []
    for short, own in (("img", "image"), ("txt", "text")):
        theirs, ours = f"double_blocks.{index}.{short}", f"blocks.{index}.{own}"
        found += [
            *linear(f"{theirs}_mod.lin", f"{ours}.modulation"),
            *linear(f"{theirs}_attn.qkv", f"{ours}.qkv"),
            *_head_norms(f"{theirs}_attn", ours),
            *linear(f"{theirs}_attn.proj", f"{ours}.out"),
            *linear(f"{theirs}_mlp.0", f"{ours}.feedforward.up"),
            *linear(f"{theirs}_mlp.2", f"{ours}.feedforward.down"),
        ]
    return found


def _single(index: int, before: int) -> list[Move]:
    """Rows of the first layer are [q, k, v, feed-forward], columns of the last [attention, feed-forward]."""
    theirs, ours = f"single_blocks.{index}", f"blocks.{before + index}"
    return [
        *linear(f"{theirs}.modulation.lin", f"{ours}.modulation"),
        *linear(f"{theirs}.linear1", f"{ours}.up"),
        *_head_norms(theirs, ours),
        *linear(f"{theirs}.linear2", f"{ours}.down"),
    ]


def _head_norms(theirs: str, ours: str) -> list[Move]:
    names = ("query_norm", "key_norm")
    return [same(f"{theirs}.norm.{name}.weight", f"{ours}.{name}.weight") for name in names]


def _final(patch: int) -> list[Move]:
    return [
        *linear("final_layer.adaLN_modulation.1", "final.modulation"),
        changed(
            "final_layer.linear.weight",
            "final.out.weight",
            lambda w: -_rows_first(w.T, patch).T,
            lambda w: -_channels_first(w.T, patch).T,
        ),
        changed(
            "final_layer.linear.bias",
            "final.out.bias",
            lambda b: -_rows_first(b[None], patch)[0],
            lambda b: -_channels_first(b[None], patch)[0],
        ),
    ]


def _rows_first(weight: Tensor, patch: int) -> Tensor:
    """(any, channel * row * column) -> (any, row * column * channel)."""
    return weight.reshape(len(weight), -1, patch, patch).permute(0, 2, 3, 1).flatten(1)


def _channels_first(weight: Tensor, patch: int) -> Tensor:
    """The inverse of `_rows_first`."""
    channels = weight.shape[1] // patch**2
    return weight.reshape(len(weight), patch, patch, channels).permute(0, 3, 1, 2).flatten(1)


def check(config: MMDiTConfig) -> None:
    """UserError for the first option that FLUX does not know."""
    for key, value in FIXED.items():
        if getattr(config, key) != value:
            raise UserError(
                f"model.{key} = {getattr(config, key)} has no place in a flux file, whose models have "
                f"{value}; export it as flowmill."
            )
    for key in ("single_depth", "vector_width"):
        if not getattr(config, key):
            raise UserError(
                f"model.{key} = 0, and every model of a flux file has some; export it as flowmill."
            )


def tables(config: MMDiTConfig) -> State:  # noqa: ARG001
    """None: its rotary positions are not in its files."""
    return {}


def recipe(config: MMDiTConfig) -> dict[str, Any]:  # noqa: ARG001
    return {"objective": {"path": "linear", "prediction": "velocity"}}


FLUX = Source("flux", FAMILIES["mmdit"], read, moves, tables, check, recipe, renamed)
