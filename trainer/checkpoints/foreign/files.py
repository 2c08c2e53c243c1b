"""Files of published weights: torch files read without running them, safetensors, and .npz for Jet.

A torch file is a pickle, which may run anything; it is read by torch's own restricted reader, that
knows tensors, plain containers and argparse.Namespace (the `args` of SiT's and DiT's checkpoints).
"""

import argparse
import math
import pickle
import re
import tokenize
import warnings
import zipfile
import zlib
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
# What reading a damaged or strange zip ends in.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
)
ARRAY_ERRORS = (*ZIP_ERRORS, SyntaxError, TypeError, tokenize.TokenError)  # and a damaged array
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


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
        reason = f"cannot be read{_because(error.strerror or error)}"
        raise UserError(f"{path}: {reason}.") from error
    except MemoryError:
        raise UserError(
            f"{path}: holds more than this machine has memory for; import it on a larger one."
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path}: holds {type(content).__name__}, not tensors by name; save a state dictionary."
        )
    chosen = _chosen(path, content, weights)
    _check_values(path, chosen)
    return chosen


def _check_values(path: Path, content: Mapping[str, Any]) -> None:
    """UserError for a tensor, in nested dictionaries too, of which the file has no more than the shape."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            _check_values(path, value)
        elif isinstance(value, torch.Tensor) and value.is_meta:
            raise UserError(
                f"{path}: tensor {name} was saved without its values (on the meta device); save the weights "
                "themselves."
            )


def _read(path: Path, source: str) -> Any:
    """By what the file begins with; by its name where that is nothing known."""
    with path.open("rb") as stream:
        start = stream.read(9)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if not start.startswith(ZIP):
        return (_read_safetensors if path.suffix == ".safetensors" else _read_torch)(path)
    names = _whole_names(path)
    if names and all(name.endswith(ARRAYS_INSIDE) for name in names):
        return _read_arrays(path, source)
    return _read_torch(path)


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise UserError(
            f"{path}: damaged safetensors file{_because(error)}; fetch it again."
        ) from None


def _because(error: object) -> str:
    """The first line of a reason, in brackets; nothing where an error gives none."""
    reason = str(error).strip().partition("\n")[0]
    return f" ({reason})" if reason else ""


def _whole_names(path: Path) -> list[str]:
    """Names of what a zip holds, every byte of which agrees with its checksum.

    Neither torch nor numpy looks at the checksums of all they read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # torch.serialization.set_crc32_options(False) leaves them all 0.
            summed = any(one.CRC for one in archive.infolist())
            bad = archive.testzip() if summed else None
    except zipfile.BadZipFile:
        raise UserError(
            f"{path}: damaged, its list of contents is missing; fetch it again."
        ) from None
    except ZIP_ERRORS as error:
        raise UserError(f"{path}: damaged{_because(error)}; fetch it again.") from None
    if bad is not None:
        raise UserError(
            f"{path}: damaged, {bad} in it does not match its checksum; fetch it again."
        )
    return names


def _read_arrays(path: Path, source: str) -> Mapping[str, Any]:
    if source != "jet":
        raise UserError(
            f"{path}: numpy arrays, which jet files alone are; give {source} weights as safetensors or "
            "a torch file."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return {
                one.filename.removesuffix(ARRAYS_INSIDE): _read_array(path, archive, one)
                for one in archive.infolist()
            }
    except ARRAY_ERRORS as error:
        raise UserError(f"{path}: damaged{_because(error)}; fetch it again.") from None


def _read_array(path: Path, archive: zipfile.ZipFile, one: zipfile.ZipInfo) -> np.ndarray:
    """An array that is as large as its header says, which is asked before any memory is."""
    with archive.open(one) as stream:
        version = np.lib.format.read_magic(stream)
        if version not in HEADERS:
            raise UserError(f"{path}: {one.filename} is no plain array; save plain arrays.")
        shape, _, dtype = HEADERS[version](stream)
        held = one.file_size - stream.tell()
    if dtype.hasobject:
        raise UserError(
            f"{path}: holds Python objects, which could run anything when they are read; save plain "
            "arrays."
        )
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise UserError(
            f"{path}: damaged, {one.filename} says it is {list(shape)} and holds {held:,} bytes; fetch it "
            "again."
        )
    with archive.open(one) as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            # Of quantized tensors, which are refused in a sentence.
            warnings.filterwarnings("ignore", message="torch.quantize_per_tensor|TypedStorage is")
            # Old files are one pickle, in which nothing can be mapped.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: {_refused(str(error))}, and Flowmill runs no code of a file; save the tensors alone "
            "(torch.save of a state dictionary, or safetensors)."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: no torch file, or a damaged one{_because(error)}; fetch it again."
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
