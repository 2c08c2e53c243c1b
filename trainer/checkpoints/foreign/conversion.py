"""From a published state dictionary to a configuration and a state dictionary of ours, and back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flows.errors import UserError
from flows.models.family import Family
from flows.models.zoo import family_with
from trainer.checkpoints.foreign import dit, dit_moe, flux, jet, tarflow
from trainer.checkpoints.foreign.moves import Move, State, to_ours, to_theirs
from trainer.checkpoints.foreign.source import (
    Contents,
    Source,
    checked_facts,
    configured,
    differs,
    finite,
)

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        tarflow.TARFLOW,
        tarflow.STARFLOW,
        dit.SIT,
        dit.DIT,
        dit.REPA,
        dit.LIGHTNING,
        dit_moe.DIT_MOE,
        flux.FLUX,
        jet.JET,
    )
}

# What torch computes with, of the kinds a file may hold: no quantized, packed or complex numbers.
REAL = {
    torch.bool,
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
}


class Converted(NamedTuple):
    """config: of one of the families in `flows.models.zoo`; state: for the model built from it."""

    config: Any
    state: State


def source_named(name: str) -> Source:
    """A format by its name; UserError naming those there are."""
    if name not in SOURCES:
        raise UserError(f"there is no format {name!r}; use {', '.join(SOURCES)}.")
    return SOURCES[name]


def convert(state_dict: Mapping[str, Any], *, source: str, **facts: Any) -> Converted:
    """The model that a state dictionary of the format `source` is of: its configuration and state.

    state_dict: names -> tensors (or numpy arrays, or nested dictionaries of them)
    facts: keys of the configuration, where names and shapes do not tell them (heads=16)

    Tensors keep their dtypes, and every bit of them. Raises UserError for what is missing, has no place,
    contradicts what was told, or must be told.
    """
    chosen = source_named(source)
    state = chosen.renamed(_flat(state_dict))
    _check_not_empty(state)
    _check_kinds(state)
    told = checked_facts(chosen.family, facts)
    contents = Contents(chosen.name, state)
    config = configured(chosen, chosen.read(contents, told), told)
    chosen.check(config)
    moves = chosen.moves(config)
    tables = chosen.tables(config)
    ours = _empty(chosen.family, config)
    expected = to_theirs(moves, ours)
    _check_tensors(chosen, state, expected)
    if strange := [name for name in state if name not in expected | tables]:
        raise UserError(
            f"tensor {strange[0]} has no place in {source} files of this model ({len(strange)} such); "
            "leave it out, or choose the format that wrote the file."
        )
    _check_numbers(state, moves, ours)
    _check_tables(chosen, state, tables)
    return Converted(config, to_ours(moves, state))


def to_foreign(config: Any, state: Mapping[str, Tensor], target: str) -> State:
    """The inverse of `convert`: a state dictionary of ours in the format `target`, tables included.

    Raises UserError where the format has no place for such a model, or a tensor is missing or has another
    shape than the model's.
    """
    chosen = source_named(target)
    if not isinstance(config, chosen.family.config):
        raise UserError(
            f"{target} files hold models of the family {chosen.family.name}, and this one is of the family "
            f"{family_with(config).name}; choose another format."
        )
    chosen.check(config)
    expected = _empty(chosen.family, config)
    if missing := sorted(expected.keys() - state.keys()):
        raise UserError(
            f"tensor {missing[0]} is missing in the state ({len(missing)} such); give the whole "
            "state dictionary of the model."
        )
    for name, empty in expected.items():
        if state[name].shape != empty.shape:
            raise UserError(
                f"tensor {name} is {list(state[name].shape)} in the state, and in this model it is "
                f"{list(empty.shape)}; give the state dictionary and the configuration of one model."
            )
    weights = to_theirs(chosen.moves(config), state)
    dtype = next(iter(weights.values())).dtype
    return weights | {name: value.to(dtype) for name, value in chosen.tables(config).items()}


def _empty(family: Family, config: Any) -> State:
    """Our state dictionary without values, on the meta device."""
    with torch.device("meta"):
        return dict(family.build(config).state_dict())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> State:
    """Tensors by name; what is nested gets the names that JAX prints, ['a']['b']."""
    flat: State = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise UserError(
                f"{key!r} ({type(key).__name__}) is no name of a tensor; give the state dictionary "
                "alone."
            )
        nested = isinstance(value, Mapping)
        name = f"{prefix}['{key}']" if prefix or nested else key
        if nested:
            flat |= _flat(value, name)
        elif isinstance(value, Tensor) and value.layout == torch.strided:
            flat[name] = value.detach()
        elif isinstance(value, Tensor):
            raise UserError(f"tensor {name} is sparse; save it as a plain tensor.")
        elif isinstance(value, np.ndarray):
            flat[name] = _from_numpy(name, value)
        else:
            raise UserError(
                f"{name} ({type(value).__name__}) is no tensor; give the state dictionary alone."
            )
    return flat


def _from_numpy(name: str, array: np.ndarray) -> Tensor:
    """With bfloat16 as JAX saves it, which numpy does not know: as two bytes of no kind."""
    brain = array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None
    try:
        if brain:
            bits = np.asarray(array, order="C").view(np.uint16)
            return torch.from_numpy(bits).view(torch.bfloat16)
        return torch.from_numpy(np.asarray(array, array.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise UserError(
            f"{name} is an array of {array.dtype}, which are no numbers that torch knows; save it in "
            "floating point."
        ) from None


def _check_not_empty(state: State) -> None:
    if empty := [name for name, value in state.items() if not value.numel()]:
        raise UserError(
            f"tensor {empty[0]} is {list(state[empty[0]].shape)}, which holds no number; restore the file."
        )


def _check_kinds(state: State) -> None:
    """UserError for the first tensor, of weights or a table, whose numbers cannot be computed with."""
    for name, value in state.items():
        if value.dtype not in REAL:
            raise UserError(f"tensor {name} holds {_not_floating(value)}")


def _not_floating(value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    return f"numbers of the kind {kind}, and weights are floating point; save them as such."


def _check_numbers(state: State, moves: Sequence[Move], ours: State) -> None:
    """UserError for the first tensor of weights that does not hold finite floating point numbers."""
    for move in moves:
        if not all(ours[name].is_floating_point() for name in move.ours):
            continue
        for name in move.theirs:
            value = state[name]
            if not value.is_floating_point():
                raise UserError(f"tensor {name} holds {_not_floating(value)}")
            if not value.is_meta and not finite(value):
                raise UserError(
                    f"tensor {name} holds numbers that are not finite; import another checkpoint, or "
                    "restore the file."
                )


def _check_tensors(source: Source, state: State, expected: State) -> None:
    """UserError for the first tensor that is missing or has another shape than it must have."""
    for name, empty in expected.items():
        if name not in state:
            raise UserError(
                f"tensor {name} is missing, which {source.name} files of this model have; restore the "
                "file, or choose the format that wrote it."
            )
        if state[name].shape != empty.shape:
            raise UserError(
                f"tensor {name} is {list(state[name].shape)}, and in {source.name} files of this model "
                f"it is {list(empty.shape)}; choose the format that wrote the file, or tell other facts."
            )


def _check_tables(source: Source, state: State, tables: State) -> None:
    """UserError for a table that is not what is computed in its place."""
    for name, table in tables.items():
        if name in state and differs(table, state[name]):
            raise UserError(
                f"tensor {name} is not the table that {source.name} computes for a model of this shape, and "
                "a model here has no place for another; this file cannot be imported."
            )
