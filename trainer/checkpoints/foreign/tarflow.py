"""TarFlow and STARFlow, as apple/ml-tarflow and apple/ml-starflow write them.

A learned position table is stored in raster order there and in the order of the chain here, so that of
a block that reads backwards is turned upside down.
"""

from typing import Any

import torch
from torch import Tensor

from flows.errors import UserError
from flows.models.autoregressive import BlockShape
from flows.models.starflow import STARFlowConfig
from flows.models.tarflow import TarFlowConfig
from flows.models.zoo import FAMILIES
from trainer.checkpoints.foreign.moves import Move, State, changed, linear, same, turned_back
from trainer.checkpoints.foreign.source import (
    Contents,
    Findings,
    Source,
    Told,
    differs,
    square_side,
)

HEAD_WIDTH = 64
RGB = 3
TEXT_WIDTH, TEXT_TOKENS = 2048, 128  # of the published models: Flan-T5-XL
ONE_HOT = 1001  # of the published class-conditional models
LATENT = (4, 32)  # channels and side of the published models' latents
VARIANCE = "var"
NOISE = "objective.noise"
START, TEXT, LABEL, POSITION = "sos_embed", "proj_txt", "class_embed", "pos_embed"


def read_tarflow(contents: Contents, told: Told) -> Findings:
    features = contents.shape("blocks.0.proj_in.weight", 2)[1]
    width, _ = contents.shape("blocks.0.proj_in.weight", 2)
    outputs, _ = contents.shape("blocks.0.proj_out.weight", 2)
    tokens, _ = contents.shape(f"blocks.0.{POSITION}", 2)
    found: dict[str, Any] = {
        "width": width,
        "flow_blocks": contents.count("blocks.{}.proj_in.weight"),
        "layers": contents.count("blocks.0.attn_blocks.{}.attention.qkv.weight"),
        "volume_preserving": outputs == features,
        "conditional": f"blocks.0.{LABEL}" in contents,
    }
    if found["volume_preserving"] and VARIANCE in contents:
        variance = contents.tensor(VARIANCE, 2)
        if differs(torch.ones(variance.shape), variance):
            raise UserError(
                f"tensor {VARIANCE} is the variance of the prior that the flow was trained with, which "
                "a model here does not hold: it is measured on the images of data.train; leave the tensor "
                "out of the file, and give the run its training data before it is sampled."
            )
    if found["conditional"]:
        found["classes"] = contents.shape(f"blocks.0.{LABEL}", 3)[0]
    found |= _patches(features, told, {"channels": RGB})
    if "patch" in found:
        found["image_size"] = square_side(tokens, f"blocks.0.{POSITION}") * found["patch"]
    return Findings(
        found,
        {"head_width": HEAD_WIDTH, "classes": 1},
        {
            "patch": f"of which the square times data.channels is {features}, the features of a token"
        },
    )


def read_starflow(contents: Contents, told: Told) -> Findings:
    if f"blocks.0.{POSITION}" in contents:
        raise UserError(
            "the file has a learned position table, with which the published program cannot run; only "
            "models with rotary positions can be imported."
        )
    width, features = contents.shape("blocks.0.proj_in.weight", 2)
    blocks = contents.count("blocks.{}.proj_in.weight")
    top = contents.shape(f"blocks.{blocks - 1}.proj_in.weight", 2)[0]
    layers = tuple(
        contents.count(f"blocks.{block}.attn_blocks.{{}}.attention.qkv.weight")
        for block in range(blocks)
    )
    found = {
        "width": width,
        "top_width": top if top != width else 0,
        "layers": layers,
        "position": "rotary",
        "start_token": f"blocks.0.{START}" in contents,
        "final_norm": "blocks.0.final_norm.weight" in contents,
        **_layer(contents, width, told.get("head_width", HEAD_WIDTH)),
    }
    usual: dict[str, Any] = {
        "head_width": HEAD_WIDTH,
        "clip": 4.0,
        "scale": "softplus",
        "order": "l2r",
        "classes": 1,
    }
    text_found, text_usual, text_hints = _text(contents, blocks, told)
    patch_found = _patches(features, told, {"patch": 1})
    if (patch_found.get("channels"), patch_found.get("patch")) == (LATENT[0], 1) and width >= 2048:
        usual["image_size"] = LATENT[1]
    hints = {
        "patch": f"of which the square times data.channels is {features}, the features of a token",
        "image_size": "the side of the latents (32 for images of 256 pixels)",
        **text_hints,
    }
    return Findings(found | patch_found | text_found, usual | text_usual, hints)


def _patches(features: int, told: Told, usual: dict[str, int]) -> dict[str, int]:
    """Patch and channels of tokens of so many features, by one of them: told, else as is usual."""
    given = {key: told[key] for key in ("patch", "channels") if key in told} or usual
    if "patch" in given:
        patch = given["patch"]
        channels = features // patch**2
    else:
        channels = given["channels"]
        patch = round((features / channels) ** 0.5)
    return {"patch": patch, "channels": channels} if channels * patch**2 == features else {}


def _layer(contents: Contents, width: int, head_width: int) -> dict[str, Any]:
    """What the first layer tells of all."""
    layer = "blocks.0.attn_blocks.0"
    qk_norm = f"{layer}.attention.query_norm.weight" in contents
    if qk_norm:
        head_width = contents.shape(f"{layer}.attention.query_norm.weight", 1)[0]
    rows, _ = contents.shape(f"{layer}.attention.qkv.weight", 2)
    kv_heads = (rows - width) // 2 // head_width
    found = {
        "kv_heads": kv_heads if kv_heads * head_width != width else 0,
        "bias": f"{layer}.attention.qkv.bias" in contents,
        "qk_norm": qk_norm,
        "gated": f"{layer}.mlp.gate_proj.weight" in contents,
        "norm": "layer" if f"{layer}.attention.norm.bias" in contents else "rms",
        "placement": "peri" if f"{layer}.attention.post_norm.weight" in contents else "pre",
    }
    return found | ({"head_width": head_width} if qk_norm else {})


def _text(
    contents: Contents, blocks: int, told: Told
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """What the blocks read before the tokens: a text, a class, or nothing."""
    reading = [block for block in range(blocks) if f"blocks.{block}.{TEXT}.weight" in contents]
    if not reading:
        return {"conditional": False}, {}, {}
    if reading not in ([blocks - 1], list(range(blocks))):
        raise UserError(
            f"blocks {', '.join(map(str, reading))} of {blocks} read the text, and in a model of ours the "
            "last or all do; this file cannot be imported."
        )
    width = contents.shape(f"blocks.{blocks - 1}.{TEXT}.weight", 2)[1]
    found = {"conditional": True, "conditioned": "all" if len(reading) > 1 else "top"}
    by_class = {"classes": width - 1, "text_tokens": 0, "text_width": 0}
    if "text_tokens" in told or width == TEXT_WIDTH:
        return {**found, "text_width": width}, {"text_tokens": TEXT_TOKENS}, {}
    if told.get("classes") == width - 1 or width == ONE_HOT:
        return {**found, **by_class}, {}, {}
    hint = (
        f"the words a text has, or data.classes={width - 1} if the model is conditioned on classes"
    )
    return found, {}, {"text_tokens": hint}


def moves_tarflow(config: TarFlowConfig) -> list[Move]:
    shapes = [config.block(index) for index in range(config.flow_blocks)]
    return [move for index, shape in enumerate(shapes) for move in _block(index, shape)]


def moves_starflow(config: STARFlowConfig) -> list[Move]:
    shapes = [config.block(index) for index in range(len(config.layers))]
    return [move for index, shape in enumerate(shapes) for move in _block(index, shape)]


def _block(index: int, shape: BlockShape) -> list[Move]:
    theirs, ours = f"blocks.{index}", f"flow_blocks.{index}"
    found = [
        *linear(f"{theirs}.proj_in", f"{ours}.project_in"),
        *linear(f"{theirs}.proj_out", f"{ours}.project_out"),
    ]
    if shape.start_token:
        found.append(
            changed(
                f"{theirs}.{START}", f"{ours}.start", lambda x: x[0, 0], lambda x: x[None, None]
            )
        )
    if shape.rotary is None:
        ordered = _upside_down if shape.reverse else _as_is
        found.append(turned_back(f"{theirs}.{POSITION}", f"{ours}.position", ordered))
    if shape.classes:
        found.append(
            changed(f"{theirs}.{LABEL}", f"{ours}.label", lambda x: x[:, 0], lambda x: x[:, None])
        )
    if shape.prefix_tokens:
        found += linear(f"{theirs}.{TEXT}", f"{ours}.prefix")
    if shape.final_norm:
        found.append(same(f"{theirs}.final_norm.weight", f"{ours}.norm.weight"))
    for layer in range(shape.layers):
        found += _layer_moves(f"{theirs}.attn_blocks.{layer}", f"{ours}.layers.{layer}", shape)
    return found


def _layer_moves(theirs: str, ours: str, shape: BlockShape) -> list[Move]:
    layer = shape.layer
    attention, feedforward = f"{ours}.attention", f"{ours}.feedforward"
    found = [
        *linear(f"{theirs}.attention.norm", f"{attention}.norm", bias=layer.norm == "layer"),
        *linear(f"{theirs}.attention.qkv", f"{attention}.inner.qkv", bias=layer.bias),
        *linear(f"{theirs}.attention.proj", f"{attention}.inner.out", bias=layer.bias),
        *linear(f"{theirs}.mlp.norm", f"{feedforward}.norm", bias=layer.norm == "layer"),
    ]
    names = {"main.0": "up", "main.2": "down"}
    if layer.gated:
        names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    for name, own in names.items():
        found += linear(f"{theirs}.mlp.{name}", f"{feedforward}.inner.{own}", bias=layer.bias)
    if layer.qk_norm:
        for name in ("query_norm", "key_norm"):
            found.append(
                same(f"{theirs}.attention.{name}.weight", f"{attention}.inner.{name}.weight")
            )
    if layer.placement == "peri":
        found += [
            same(f"{theirs}.attention.post_norm.weight", f"{attention}.out_norm.weight"),
            same(f"{theirs}.mlp.post_norm.weight", f"{feedforward}.out_norm.weight"),
        ]
    return found


def _upside_down(table: Tensor) -> Tensor:
    return table.flip(0)


def _as_is(table: Tensor) -> Tensor:
    return table


def tables_tarflow(config: TarFlowConfig) -> State:
    """The variance of the prior, which is 1 here, and the causal mask of every block."""
    mask = torch.ones(config.tokens, config.tokens).tril()
    masks = {f"blocks.{index}.attn_mask": mask.clone() for index in range(config.flow_blocks)}
    return {VARIANCE: torch.ones(config.tokens, config.features), **masks}


def tables_starflow(config: STARFlowConfig) -> State:  # noqa: ARG001
    """None: its rotary positions are not in its files."""
    return {}


def check_tarflow(config: TarFlowConfig) -> None:
    if (config.norm, config.placement) != ("layer", "pre"):
        raise UserError(
            f"model.norm = {config.norm} and model.placement = {config.placement} have no place in an "
            "ml-tarflow file, whose models have layer norms before each part; export it as flowmill."
        )
    if config.clip:
        raise UserError(
            f"model.clip = {config.clip:g} has no place in an ml-tarflow file, whose models clip nothing; "
            "export it as flowmill."
        )


def check_starflow(config: STARFlowConfig) -> None:
    if config.norm == "dyt" or config.placement == "post" or config.scale == "one":
        raise UserError(
            f"model.norm = {config.norm}, model.placement = {config.placement} and model.scale = "
            f"{config.scale} do not all have a place in an ml-starflow file (norms are layer or rms, "
            "placed pre or peri); export it as flowmill."
        )
    if config.position != "rotary":
        raise UserError(
            "model.position = learned has no place in an ml-starflow file: the published program cannot "
            "run it; export it as flowmill."
        )


def recipe_tarflow(config: TarFlowConfig) -> dict[str, Any]:  # noqa: ARG001
    return {"objective": {"dequantisation": "none", "noise": 0.05}}


def recipe_starflow(config: STARFlowConfig) -> dict[str, Any]:  # noqa: ARG001
    return {
        "objective": {"dequantisation": "none", "noise": 0.3, "power": 1e-4},
        "sample": {"form": "distribution"},
    }


TARFLOW = Source(
    "ml-tarflow",
    FAMILIES["tarflow"],
    read_tarflow,
    moves_tarflow,
    tables_tarflow,
    check_tarflow,
    recipe_tarflow,
    assumed=(NOISE,),
)
STARFLOW = Source(
    "ml-starflow",
    FAMILIES["starflow"],
    read_starflow,
    moves_starflow,
    tables_starflow,
    check_starflow,
    recipe_starflow,
    assumed=(NOISE,),
)
