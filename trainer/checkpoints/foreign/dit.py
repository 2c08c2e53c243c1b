"""SiT, DiT, REPA's SiT and LightningDiT: one network, four programs.

Their order of modulations (shift, scale, gate) and of queries, keys and values is ours. REPA counts
time from data to noise and predicts noise - data, DiT counts diffusion steps and predicts noise: the
configuration says what the network is told of the time (`model.time`), and the last layer of a REPA
network changes its sign.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flows.errors import UserError
from flows.models.dit import DiTConfig
from flows.models.dit_sizes import BIG, BIGGER
from flows.models.embeddings import sincos_positions
from flows.models.rotary import axial_turns, grid_places
from flows.models.zoo import FAMILIES
from trainer.checkpoints.foreign.moves import (
    Move,
    State,
    kernel,
    linear,
    same,
    turned_back,
)
from trainer.checkpoints.foreign.source import (
    Contents,
    Findings,
    Source,
    Told,
    heads_of,
    square_side,
)

PUBLISHED_HEADS = {(width, depth): heads for width, depth, heads in (BIG | BIGGER).values()}
POSITION, LABELS = "pos_embed", "y_embedder.embedding_table.weight"
COSINES, SINES = "feat_rope.freqs_cos", "feat_rope.freqs_sin"


def read_plain(contents: Contents, told: Told, *, time: str) -> Findings:  # noqa: ARG001
    """SiT and DiT; `time`: what the program's network is told of it."""
    width, channels, patch, _ = contents.shape("x_embedder.proj.weight", 4)
    depth = contents.count("blocks.{}.attn.qkv.weight")
    outputs, _ = contents.shape("final_layer.linear.weight", 2)
    rows, _ = contents.shape(LABELS, 2)
    if rows < 2:
        raise UserError(
            f"{LABELS} has {rows} row, and the last is that of no class, so that the file knows none; "
            "give a file of a model with classes."
        )
    found: dict[str, Any] = {
        "patch": patch,
        "channels": channels,
        "width": width,
        "depth": depth,
        "classes": rows - 1,
        "learn_sigma": outputs == 2 * patch**2 * channels,
    }
    if POSITION in contents:
        tokens = contents.shape(POSITION, 3)[1]
        found["image_size"] = square_side(tokens, POSITION) * patch
    usual: dict[str, Any] = {"time": time}
    if (width, depth) in PUBLISHED_HEADS:
        usual["heads"] = PUBLISHED_HEADS[width, depth]
    hints = {
        "heads": "which no published model of this width and depth fixes",
        "image_size": "the side of the latents (32 for images of 256 pixels)",
    }
    return Findings(found, usual, hints)


def read_repa(contents: Contents, told: Told) -> Findings:
    plain = read_plain(contents, told, time="reversed")
    hidden, _ = contents.shape("projectors.0.0.weight", 2)
    if "projectors.1.0.weight" in contents:
        raise UserError(
            "the file has several projectors, for features of several encoders, and a model here has one; "
            "leave out all tensors of projectors but the first's."
        )
    found = {"align_width": contents.shape("projectors.0.4.weight", 2)[0], "align_hidden": hidden}
    published = (plain.found["width"], plain.found["depth"]) in PUBLISHED_HEADS
    usual = {"align_depth": 8} if published else {}
    hints = {"align_depth": "the block whose output is aligned (8 in the published models)"}
    return Findings(plain.found | found, plain.usual | usual, plain.hints | hints)


def read_lightning(contents: Contents, told: Told) -> Findings:
    plain = read_plain(contents, told, time="flow")
    width, first = plain.found["width"], "blocks.0."
    found: dict[str, Any] = {
        "norm": "rms" if f"{first}norm1.weight" in contents else "layer",
        "norm_affine": f"{first}norm1.weight" in contents,
        "qk_norm": f"{first}attn.q_norm.weight" in contents,
        "rope": COSINES in contents,
        "feedforward": "swiglu" if f"{first}mlp.w12.weight" in contents else "gelu",
        "wo_shift": contents.shape(f"{first}adaLN_modulation.1.weight", 2)[0] == 4 * width,
    }
    if f"{first}attn.q_norm.bias" in contents:
        raise UserError(
            "queries and keys are normalised by a layer norm here, and a model of ours has an RMS norm for "
            "them; train with use_rmsnorm, as the published models are."
        )
    if COSINES in contents:
        found["heads"] = heads_of(width, contents.shape(COSINES, 2)[1], COSINES)
    elif found["qk_norm"]:
        norm = f"{first}attn.q_norm.weight"
        found["heads"] = heads_of(width, contents.shape(norm, 1)[0], norm)
    return Findings(plain.found | found, plain.usual, plain.hints)


def moves(config: DiTConfig, *, sign: int = 1) -> list[Move]:
    """sign: of the program's prediction, -1 where it predicts noise - data."""
    return [
        *first_moves(config.patch),
        *(move for index in range(config.depth) for move in _block(config, index)),
        *_projector(config),
        *final_moves(sign=sign),
        *([same("final_layer.norm_final.weight", "final.norm.weight")] * config.norm_affine),
    ]


def first_moves(patch: int) -> list[Move]:
    """Of what stands before the blocks."""
    return [
        kernel("x_embedder.proj.weight", "patches.weight", patch),
        same("x_embedder.proj.bias", "patches.bias"),
        *linear("t_embedder.mlp.0", "time.up"),
        *linear("t_embedder.mlp.2", "time.out"),
        same(LABELS, "label.weight"),
    ]


def _block(config: DiTConfig, index: int) -> list[Move]:
    block = f"blocks.{index}"
    up, down = ("mlp.w12", "mlp.w3") if config.feedforward == "swiglu" else ("mlp.fc1", "mlp.fc2")
    found = [
        *linear(f"{block}.adaLN_modulation.1", f"{block}.modulation"),
        *linear(f"{block}.attn.qkv", f"{block}.attention.qkv"),
        *linear(f"{block}.attn.proj", f"{block}.attention.out"),
        *linear(f"{block}.{up}", f"{block}.feedforward.up"),
        *linear(f"{block}.{down}", f"{block}.feedforward.down"),
    ]
    if config.norm_affine:
        found += [same(f"{block}.norm{i}.weight", f"{block}.norm_{i}.weight") for i in (1, 2)]
    if config.qk_norm:
        found += [
            same(f"{block}.attn.q_norm.weight", f"{block}.attention.query_norm.weight"),
            same(f"{block}.attn.k_norm.weight", f"{block}.attention.key_norm.weight"),
        ]
    return found


def _projector(config: DiTConfig) -> list[Move]:
    if not config.align_depth:
        return []
    layers = {0: "up", 2: "middle", 4: "out"}
    return [
        move
        for place, name in layers.items()
        for move in linear(f"projectors.0.{place}", f"projector.{name}")
    ]


def final_moves(*, sign: int) -> list[Move]:
    """Of what stands behind them, but a norm; sign: as in `moves`."""
    return [
        *linear("final_layer.adaLN_modulation.1", "final.modulation"),
        *(
            turned_back(f"final_layer.linear.{part}", f"final.out.{part}", lambda x: sign * x)
            for part in ("weight", "bias")
        ),
    ]


def tables(config: DiTConfig) -> State:
    """The frozen positions, and LightningDiT's rotations: cosines and sines of each pair, twice."""
    side = config.image_size // config.patch
    computed = {POSITION: sincos_positions(side, config.width)[None]}
    if config.rope:
        pairs = config.width // config.heads // 4
        turn = axial_turns(grid_places(side, torch.device("cpu")), (pairs, pairs))
        cosine, sine = turn.repeat_interleave(2, dim=-1)
        computed |= {COSINES: cosine, SINES: sine}
    return computed


# The keys that make a DiT one of the other programs', with what they are in a plain one.
LIGHTNING_KEYS = {
    "norm": "layer",
    "norm_affine": False,
    "qk_norm": False,
    "rope": False,
    "feedforward": "gelu",
    "wo_shift": False,
}
ALIGN_KEYS = {"align_depth": 0}
OWN_KEYS = {"norm_placement": "pre", "text_width": 0}


def check(config: DiTConfig, *, name: str, time: str, plain: dict[str, Any]) -> None:
    """UserError for the first option that the program `name` does not know; `plain`: key -> its value."""
    for key, value in (plain | OWN_KEYS | {"time": time}).items():
        if getattr(config, key) != value:
            raise UserError(
                f"model.{key} = {getattr(config, key)} has no place in a {name} file, whose models have "
                f"{value}; choose another format."
            )


def check_lightning(config: DiTConfig) -> None:
    check(config, name="lightningdit", time="flow", plain=ALIGN_KEYS)
    if (config.norm, config.norm_affine) not in (("layer", False), ("rms", True)):
        raise UserError(
            f"model.norm = {config.norm} with model.norm_affine = {config.norm_affine} has no place in a "
            "lightningdit file; its norms are plain layer norms, or RMS norms with weights."
        )


def check_repa(config: DiTConfig) -> None:
    check(config, name="repa", time="reversed", plain=LIGHTNING_KEYS)
    if not config.align_depth:
        raise UserError(
            "model.align_depth = 0, and the models of a repa file have a projector; export it as sit."
        )


def _recipe(path: str, prediction: str, config: DiTConfig) -> dict[str, Any]:  # noqa: ARG001
    return {"objective": {"path": path, "prediction": prediction}}


VELOCITY = partial(_recipe, "linear", "velocity")
PLAIN = LIGHTNING_KEYS | ALIGN_KEYS


def _source(
    name: str,
    read: Callable[[Contents, Told], Findings],
    check_config: Callable[[Any], None],
    recipe: Callable[[Any], dict[str, Any]] = VELOCITY,
    sign: int = 1,
) -> Source:
    move = partial(moves, sign=sign)
    return Source(name, FAMILIES["dit"], read, move, tables, check_config, recipe)


SIT = _source(
    "sit", partial(read_plain, time="flow"), partial(check, name="sit", time="flow", plain=PLAIN)
)
DIT = _source(
    "dit",
    partial(read_plain, time="steps"),
    partial(check, name="dit", time="steps", plain=PLAIN),
    # The linear schedule of diffusion steps is the VP path, sampled at 1,000 places.
    partial(_recipe, "vp", "noise"),
)
REPA = _source("repa", read_repa, check_repa, sign=-1)
LIGHTNING = _source("lightningdit", read_lightning, check_lightning)
