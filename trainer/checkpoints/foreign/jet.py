"""Jet, as google-research/big_vision writes it: a JAX tree whose leaves stack all couplings.

Kernels are (in, out) and those of attention also apart by heads. The orders that couplings split by
are matrices there, all zero for the kind a coupling is not, and the buffers `order_<coupling>` here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flows.errors import UserError
from flows.models.jet import PATTERNS, JetConfig, Kind, Pattern, initial_order
from flows.models.zoo import FAMILIES
from trainer.checkpoints.foreign.moves import Move, State, changed, stacked
from trainer.checkpoints.foreign.source import Contents, Findings, Source, Told, square_side

RGB = 3
CHANNEL_MASKS = "['channel_coupling_masks-FREEZE_ME']"
SPATIAL_MASKS = "['spatial_coupling_masks-FREEZE_ME']"
ATTENTION = "MultiHeadDotProductAttention_0"


def named(*keys: str) -> str:
    """The name of a leaf below the networks of the couplings."""
    return "".join(f"['{key}']" for key in ("couplings", "dnn", *keys))


def renamed(state: State) -> State:
    """Names as in `named`, from those of .npz files too, which are params/couplings/dnn/... there."""

    def rename(name: str) -> str:
        if name.startswith("["):
            return name
        return "".join(f"['{key}']" for key in name.split("/") if key != "params")

    # Of a training's file the parameters alone: the optimizer's tensors have the same names.
    whole = any(name.startswith("params/") for name in state)
    kept = {n: v for n, v in state.items() if not whole or n.startswith("params/")}
    return {rename(name): value for name, value in kept.items()}


def read(contents: Contents, told: Told) -> Findings:
    couplings, _, tokens, width = contents.shape(named("posemb"), 4)
    features = 2 * contents.shape(named("init_proj", "kernel"), 3)[1]
    if any(name.startswith(named(ATTENTION)) for name in contents.state):
        raise UserError(
            "the networks attend to a context, which models of ours do not have; only unconditional Jets "
            "can be imported."
        )
    channels = int(told.get("channels", RGB))
    patch = round((features / channels) ** 0.5)
    found: dict[str, Any] = {
        "width": width,
        "couplings": couplings,
        "layers": contents.count(named("vit", "encoderblock_{}", "LayerNorm_0", "scale")),
        "heads": contents.shape(named("vit", "encoderblock_0", ATTENTION, "query", "kernel"), 4)[2],
        "conditional": False,
    }
    if patch**2 * channels == features:
        side = square_side(tokens, named("posemb"))
        found |= {"patch": patch, "channels": channels, "image_size": side * patch}
        found |= _splits(contents, side, couplings, features)
    hint = f"of which the square times data.channels is {features}, the features of a token"
    return Findings(found, {"classes": 1}, {"patch": hint})


def _splits(contents: Contents, side: int, couplings: int, features: int) -> dict[str, Any]:
    """Kinds of the couplings and patterns of the spatial ones, as the shortest lists that repeat.

    Raises UserError for masks that do not give each coupling one order, of features or of tokens.
    """
    channel, spatial = contents.tensor(CHANNEL_MASKS, 3), contents.tensor(SPATIAL_MASKS, 3)
    for name, mask, size in ((CHANNEL_MASKS, channel, features), (SPATIAL_MASKS, spatial, side**2)):
        if mask.shape != (couplings, size, size):
            raise UserError(
                f"tensor {name} is {list(mask.shape)}, and in a jet file of this model it is "
                f"{[couplings, size, size]}; restore the file."
            )
    kinds: list[Kind] = []
    for index, (of_features, of_tokens) in enumerate(zip(channel, spatial, strict=True)):
        if _permutes(of_features) and not of_tokens.any():
            kinds.append("channel")
        elif _permutes(of_tokens) and not of_features.any():
            kinds.append("spatial")
        else:
            raise UserError(
                f"tensors {CHANNEL_MASKS} and {SPATIAL_MASKS} do not hold one matrix of zeros and ones that "
                f"puts features or tokens in an order for coupling {index}, and zeros for the other; this "
                "file cannot be imported."
            )
    splits = [_order(mask) for mask, kind in zip(spatial, kinds, strict=True) if kind == "spatial"]
    found: dict[str, Any] = {"kinds": _period(kinds)}
    return found | (
        {"patterns": _period([_pattern(one, side) for one in splits])} if splits else {}
    )


def _permutes(mask: Tensor) -> bool:
    """Whether a square matrix has a single 1 in every row and column, and zeros beside."""
    ones = mask == 1
    exact = (ones | (mask == 0)).all() and (ones.sum(0) == 1).all() and (ones.sum(1) == 1).all()
    return bool(exact)


def _order(mask: Tensor) -> Tensor:
    """(size,) int64 places that a matrix M takes the entries of x M from."""
    return (mask == 1).int().argmax(0)


def _pattern(order: Tensor, side: int) -> Pattern:
    """The pattern that puts the tokens of a grid in this order."""
    for name in PATTERNS:
        one = JetConfig(
            image_size=side,
            channels=2,
            classes=1,
            patch=1,
            width=1,
            couplings=1,
            layers=1,
            heads=1,
            kinds=("spatial",),
            patterns=(name,),
        )
        if torch.equal(initial_order(one, 0), order):
            return name
    raise UserError(
        f"{SPATIAL_MASKS} splits the tokens of a coupling by none of the patterns that are known "
        f"({', '.join(PATTERNS)}); this file cannot be imported."
    )


def _period(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest beginning of `values` that repeats to give all."""
    lengths = range(1, len(values) + 1)
    length = next(n for n in lengths if all(v == values[i % n] for i, v in enumerate(values)))
    return tuple(values[:length])


def moves(config: JetConfig) -> list[Move]:
    every = range(config.couplings)

    def stack(theirs: Sequence[str], ours: str, each: Callable[[str, str], Move]) -> Move:
        name = named(*theirs)
        return stacked(name, [f"blocks.{i}.{ours}" for i in every], each(name, ours))

    def dense(theirs: Sequence[str], ours: str) -> list[Move]:
        return [
            stack((*theirs, "kernel"), f"{ours}.weight", _transposed),
            stack((*theirs, "bias"), f"{ours}.bias", _unchanged),
        ]

    def norm(theirs: Sequence[str], ours: str) -> list[Move]:
        return [
            stack((*theirs, "scale"), f"{ours}.weight", _unchanged),
            stack((*theirs, "bias"), f"{ours}.bias", _unchanged),
        ]

    found = [
        _orders(config),
        stack(
            ("posemb",), "position", lambda t, o: changed(t, o, lambda x: x[0], lambda x: x[None])
        ),
        *dense(("init_proj",), "up"),
        *norm(("vit", "encoder_norm"), "norm"),
        *dense(("final_proj",), "out"),
    ]
    for layer in range(config.layers):
        block, ours = ("vit", f"encoderblock_{layer}"), f"layers.{layer}"
        found += [
            *norm((*block, "LayerNorm_0"), f"{ours}.attention_norm"),
            *norm((*block, "LayerNorm_1"), f"{ours}.feedforward_norm"),
            *dense((*block, "MlpBlock_0", "Dense_0"), f"{ours}.feedforward.up"),
            *dense((*block, "MlpBlock_0", "Dense_1"), f"{ours}.feedforward.down"),
            *_attention(config, layer, stack),
        ]
    return found


def _attention(
    config: JetConfig,
    layer: int,
    stack: Callable[[Sequence[str], str, Callable[[str, str], Move]], Move],
) -> list[Move]:
    """Queries, keys and values are one matrix here: heads' rows below each other, then q, k, v."""
    theirs, ours = ("vit", f"encoderblock_{layer}", ATTENTION), f"layers.{layer}.attention"
    names = [named(*theirs, part, "kernel") for part in ("query", "key", "value")]
    biases = [named(*theirs, part, "bias") for part in ("query", "key", "value")]
    every = range(config.couplings)
    heads = (config.heads, -1)

    def out(theirs: str, ours: str) -> Move:
        return changed(theirs, ours, lambda x: x.flatten(0, 1).T, lambda x: x.T.unflatten(0, heads))

    return [
        Move(
            tuple(names),
            tuple(f"blocks.{i}.{ours}.qkv.weight" for i in every),
            lambda t: [torch.cat([part[i].flatten(1).T for part in t]) for i in every],
            lambda t: [
                torch.stack([one.chunk(3)[part].T.unflatten(1, heads) for one in t])
                for part in range(3)
            ],
        ),
        Move(
            tuple(biases),
            tuple(f"blocks.{i}.{ours}.qkv.bias" for i in every),
            lambda t: [torch.cat([part[i].flatten() for part in t]) for i in every],
            lambda t: [
                torch.stack([one.chunk(3)[part].unflatten(0, heads) for one in t])
                for part in range(3)
            ],
        ),
        stack((*theirs, "out", "kernel"), f"{ours}.out.weight", out),
        stack((*theirs, "out", "bias"), f"{ours}.out.bias", _unchanged),
    ]


def _orders(config: JetConfig) -> Move:
    """Matrices M, with x M the tokens or features in order, and the places they come from."""
    kinds = [config.coupling(index)[0] for index in range(config.couplings)]

    def come(masks: list[Tensor]) -> list[Tensor]:
        channel, spatial = masks
        return [
            _order((channel if kind == "channel" else spatial)[index])
            for index, kind in enumerate(kinds)
        ]

    def go(orders: list[Tensor]) -> list[Tensor]:
        masks = []
        for of, size in (("channel", config.features), ("spatial", config.tokens)):
            mask = torch.zeros(len(orders), size, size, device=orders[0].device)
            for index, order in enumerate(orders):
                if kinds[index] == of:
                    mask[index].scatter_(0, order[None], 1.0)
            masks.append(mask)
        return masks

    ours = tuple(f"order_{index}" for index in range(config.couplings))
    return Move((CHANNEL_MASKS, SPATIAL_MASKS), ours, come, go)


def _transposed(theirs: str, ours: str) -> Move:
    return changed(theirs, ours, lambda x: x.T, lambda x: x.T)


def _unchanged(theirs: str, ours: str) -> Move:
    return changed(theirs, ours, lambda x: x, lambda x: x)


def check(config: JetConfig) -> None:
    """UserError for what the program has no place for."""
    if config.conditional:
        raise UserError(
            "model.conditional = True has no place in a jet file, whose networks attend to a context "
            "instead; export it as flowmill."
        )


def recipe(config: JetConfig) -> dict[str, Any]:  # noqa: ARG001
    return {"objective": {"bins": "above"}}


def tables(config: JetConfig) -> State:  # noqa: ARG001
    return {}


JET = Source("jet", FAMILIES["jet"], read, moves, tables, check, recipe, renamed)
