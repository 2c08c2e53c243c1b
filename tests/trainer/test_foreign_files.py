"""Files of published weights are read without running anything in them, or refused in a sentence."""

import argparse
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flows.errors import UserError
from trainer.checkpoints.foreign.files import read_weights

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
RAW = {name: value + 1 for name, value in STATE.items()}


class Mine:
    """An object that a program may have put beside its weights."""


def equal(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.equal(torch.as_tensor(found[name]), wanted[name]) for name in wanted
    )


def test_a_checkpoint_of_sit_gives_its_averaged_weights_or_its_raw_ones(tmp_path: Path) -> None:
    """With `args` as SiT and DiT write them: an argparse.Namespace."""
    path = tmp_path / "0400000.pt"
    args = argparse.Namespace(model="SiT-XL/2", image_size=256)
    torch.save({"model": RAW, "ema": STATE, "opt": {"state": {}}, "args": args}, path)
    assert equal(read_weights(path, "sit", None), STATE)
    assert equal(read_weights(path, "sit", "ema"), STATE)
    assert equal(read_weights(path, "sit", "raw"), RAW)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dictionary_alone_is_read_from_new_and_old_torch_files(
    tmp_path: Path, legacy: bool
) -> None:
    path = tmp_path / "weights"  # whatever it is called
    torch.save(STATE, path, _use_new_zipfile_serialization=not legacy)
    assert equal(read_weights(path, "sit", None), STATE)


def test_safetensors_and_arrays_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "weights.safetensors")
    assert equal(read_weights(tmp_path / "weights.safetensors", "flux", None), STATE)
    np.savez(tmp_path / "jet.npz", **{name: value.numpy() for name, value in STATE.items()})
    assert equal(read_weights(tmp_path / "jet.npz", "jet", None), STATE)


def test_a_file_of_one_kind_of_weights_says_so(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "alone.pt")
    with pytest.raises(UserError, match="no averaged weights; import its raw ones"):
        read_weights(tmp_path / "alone.pt", "sit", "ema")
    torch.save({"model": STATE}, tmp_path / "raw.pt")
    assert equal(read_weights(tmp_path / "raw.pt", "sit", None), STATE)
    with pytest.raises(UserError, match="no averaged weights; import its raw ones"):
        read_weights(tmp_path / "raw.pt", "sit", "ema")
    torch.save({"ema": STATE}, tmp_path / "ema.pt")
    with pytest.raises(UserError, match="no raw weights; import its averaged ones"):
        read_weights(tmp_path / "ema.pt", "sit", "raw")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return (Path.touch, (witness,))

    for name, write in (("pickle", pickle.dumps), ("torch", None)):
        path = tmp_path / name
        content = {"weight": torch.ones(1), "more": Runs()}
        if write is None:
            torch.save(content, path)
        else:
            path.write_bytes(write(content))
        with pytest.raises(UserError, match="Flowmill runs no code of a file; save the tensors"):
            read_weights(path, "sit", None)
    assert not witness.exists()


def test_an_object_beside_the_tensors_is_named(tmp_path: Path) -> None:
    torch.save({"model": STATE, "config": Mine()}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"Python object of the kind \S*Mine beside its tensors"):
        read_weights(tmp_path / "weights.pt", "sit", None)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"weight": [1.0]}))
    with pytest.raises(UserError, match="is a pickle of Python objects, not a torch file"):
        read_weights(tmp_path / "plain.pkl", "sit", None)
    np.savez(tmp_path / "jet.npz", weight=np.array([Mine()], dtype=object))
    with pytest.raises(UserError, match="holds Python objects"):
        read_weights(tmp_path / "jet.npz", "jet", None)


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    cases = {
        "text.pt": (
            b"not a file of weights at all\n" * 10,
            "no torch file, or a damaged one|pickle",
        ),
        "empty.pt": (b"", "no torch file, or a damaged one"),
        "empty.safetensors": (b"", "damaged safetensors file"),
        "torn.safetensors": (b"\x10\0\0\0\0\0\0\0{not json", "damaged safetensors file"),
        "torn.npz": (b"PK\x03\x04 and no more", "its list of contents is missing"),
    }
    for name, (content, sentence) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=sentence) as refused:
            read_weights(tmp_path / name, "sit", None)
        assert str(tmp_path / name) in str(refused.value)
    whole = tmp_path / "whole.pt"
    torch.save({"weight": torch.randn(1000)}, whole)
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(UserError, match=r"half\.pt"):
        read_weights(tmp_path / "half.pt", "sit", None)
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds list, not tensors by name"):
        read_weights(tmp_path / "list.pt", "sit", None)
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "none.pt", "sit", None)
    with pytest.raises(UserError, match="a folder"):
        read_weights(tmp_path, "sit", None)


def test_a_flipped_bit_in_a_torch_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"weight": torch.ones(1000)}, path)
    content = bytearray(path.read_bytes())
    content[content.find(torch.ones(9).numpy().tobytes()) + 400] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"damaged, .*/data/0 .* does not match its checksum; fetch"
    ):
        read_weights(path, "sit", None)


def test_a_torch_file_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert equal(read_weights(tmp_path / "weights.pt", "sit", None), STATE)


def header(shape: str, dtype: str = "<f4") -> bytes:
    """The beginning of an .npy file of version 1."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            header("(1000000000, 1000000000)") + bytes(8),
            "damaged, a.npy says it is .* holds 8 bytes",
        ),
        (header("(-1, -2)") + bytes(8), "damaged, a.npy says it is"),
        (header("(2,)") + bytes(7), "damaged, a.npy says it is .* holds 7 bytes"),
        (header("(2,") + bytes(8), r"damaged \(.+\); fetch it again"),
        (b"nothing of numpy", r"damaged \(.+\); fetch it again"),
        (b"", r"damaged \(.+\); fetch it again"),
        (b"\x93NUMPY\x09\x00" + bytes(9), "a.npy is no plain array"),
    ],
)
def test_arrays_that_are_not_what_they_say_are_refused(content, sentence, tmp_path: Path) -> None:
    path = tmp_path / "jet.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(UserError, match=sentence):
        read_weights(path, "jet", None)


def test_a_flipped_bit_in_arrays_is_found(tmp_path: Path) -> None:
    path = tmp_path / "jet.npz"
    np.savez(path, weight=np.ones(100, np.float32))
    content = bytearray(path.read_bytes())
    content[content.find(np.ones(9, np.float32).tobytes()) + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged, weight\.npy in it does not match its checksum"):
        read_weights(path, "jet", None)


def test_arrays_are_for_jet_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", weight=np.ones(3))
    with pytest.raises(UserError, match="which jet files alone are; give sit weights as"):
        read_weights(tmp_path / "weights.npz", "sit", None)
