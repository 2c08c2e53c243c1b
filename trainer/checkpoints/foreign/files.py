"""Files of published weights: torch files read without running them, safetensors, and .npz for Jet.

A torch file is a pickle, which may run anything; it is read by torch's own restricted reader, that
knows tensors, plain containers and argparse.Namespace (the `args` of SiT's and DiT's checkpoints).
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flows.errors import UserError

Weights = Literal["ema", "raw"]
# Where programs keep the weights of a checkpoint, by what is asked for.
PLACES: dict[Weights, tuple[str, ...]] = {
    "ema": ("ema", "model_ema", "ema_state_dict"),
    "raw": ("model", "state_dict", "module", "params"),
}
ZIP, ARRAYS_INSIDE = b"PK", ".npy"


def read_weights(path: Path, source: str, weights: Weights | None) -> Mapping[str, Any]:
    """The state dictionary in a file, of the averaged weights if it has both.

    source: the format it is of
    weights: which of the two, where a checkpoint has both; None: averaged if there are any
    Raises UserError for a file that cannot be read, that is no file of tensors, or that holds code.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; give the file with the weights.")
    try:
        content = _read(path, source)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, not tensors by name; save a state dictionary."
        )
    return _chosen(path, content, weights)


def _read(path: Path, source: str) -> Any:
    """By what the file begins with, whatever it is called."""
    with path.open("rb") as stream:
        start = stream.read(9)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith(ZIP) and _is_arrays(path):
        return _read_arrays(path, source)
    return _read_torch(path)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{path}: damaged safetensors file ({error}); fetch it again.") from None


def _is_arrays(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise UserError(
            f"{path}: damaged, its list of contents is missing; fetch it again."
        ) from None
    return bool(names) and all(name.endswith(ARRAYS_INSIDE) for name in names)


def _read_arrays(path: Path, source: str) -> Mapping[str, Any]:
    if source != "jet":
        raise UserError(
            f"{path}: numpy arrays, which jet files alone are; give {source} weights as safetensors or "
            "a torch file."
        )
    with np.load(path, allow_pickle=False) as archive:
        try:
            return {name: archive[name] for name in archive.files}
        except ValueError:
            raise UserError(
                f"{path}: holds Python objects, which could run anything when they are read; save plain "
                "arrays."
            ) from None


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # Old files are one pickle, in which nothing can be mapped.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: {_refused(str(error))}, and Flowmill runs no code of a file; save the tensors alone "
            "(torch.save of a state dictionary, or safetensors)."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: no torch file, or a damaged one ({reason}); fetch it again."
        ) from None


def _refused(message: str) -> str:
    """What torch's restricted reader met, from what it says about it."""
    if met := re.search(r"GLOBAL ([\w.]+)", message):
        return f"holds a Python object of the kind {met[1]} beside its tensors"
    return "is a pickle of Python objects, not a torch file of tensors"


def _chosen(path: Path, content: Mapping[str, Any], weights: Weights | None) -> Mapping[str, Any]:
    """The weights themselves, where the file has them beside an optimizer and the like."""
    held = {kind: _first(content, places) for kind, places in PLACES.items()}
    if held["ema"] is None and held["raw"] is None:
        if weights == "ema":
            raise UserError(f"{path}: has no averaged weights; import its raw ones.")
        return content
    order: tuple[Weights, ...] = ("ema", "raw") if weights is None else (weights,)
    for kind in order:
        if (found := held[kind]) is not None:
            return found
    asked, other = ("averaged", "raw") if weights == "ema" else ("raw", "averaged")
    raise UserError(f"{path}: has no {asked} weights; import its {other} ones.")


def _first(content: Mapping[str, Any], places: tuple[str, ...]) -> Mapping[str, Any] | None:
    return next((content[p] for p in places if isinstance(content.get(p), Mapping)), None)
