"""Packing is deterministic and changes no pixel; what it makes, plain `webdataset` reads."""

import hashlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.decode.images import load, read_picture
from data_pipeline.description import folder_of, read_description
from data_pipeline.pack import open_source, pack
from data_pipeline.samples import Samples
from data_pipeline.shards import expand
from data_pipeline.storing import sha256_of
from data_pipeline.verify import verify
from flows.errors import UserError
from tests.data_pipeline.conftest import sample, write_tar

PLAIN = {"label_field": None, "caption_field": None, "image_field": "image"}


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def decoded(url: str) -> tuple[np.ndarray, np.ndarray]:
    contents = Samples(url, classes=None)
    every = np.arange(len(contents))
    encoded = contents.read(np.zeros_like(every), every)
    return np.stack([np.asarray(load(read_picture(i, ""))) for i in encoded.images]), encoded.labels


@pytest.mark.parametrize(
    ("url", "shape", "checksum"),
    [
        ("embedded:digits28/train-000002.tar", (2250, 28, 28), "ce07ecf716b01f9a"),
        ("embedded:emoji64/train-000001.tar", (425, 64, 64, 3), "8e3a4b1a802c0368"),
    ],
)
def test_embedded_pixels_are_those_of_the_sources(url, shape, checksum):
    """The checksums were taken from the sources, not from the shards."""
    pixels, labels = decoded(url)
    assert pixels.shape == shape
    found = hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    assert found[:16] == checksum


def test_embedded_small_digits_are_those_of_scikit_learn():
    parts = [decoded(url)[0] for url in expand("embedded:digits8/*.tar")]
    # The one way of packing that is rounded; it inverts exactly.
    packed = np.rint(np.concatenate(parts) * (16 / 255))
    assert np.array_equal(
        np.unique(packed.reshape(-1, 64), axis=0),
        np.unique(load_digits().images.reshape(-1, 64), axis=0),
    )


@pytest.mark.parametrize(
    ("name", "train", "heldout", "classes"),
    [("digits28", 9000, 1000, 10), ("emoji64", 1700, 170, 9), ("digits8", 1500, 297, 10)],
)
def test_embedded_splits(name, train, heldout, classes):
    keys = []
    for split, count in (("train", train), ("heldout", heldout)):
        contents = Samples(f"embedded:{name}/{split}-*.tar", classes=classes)
        assert len(contents) == count
        shard = np.repeat(np.arange(len(contents.sizes)), contents.sizes)
        number = np.concatenate([np.arange(size) for size in contents.sizes])
        keys += [key.rpartition("/")[2] for key in contents.keys(shard, number)]
        assert set(contents.read(shard, number).labels.tolist()) == set(range(classes))
    assert len(set(keys)) == train + heldout


def test_plain_webdataset_reads_the_shards():
    urls = list(expand("embedded:emoji64/heldout-*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(read) == 170
    for record in read:
        assert record["png"].shape == (64, 64, 3)
        assert record["json"]["class"] == record["cls"]
        assert record["json"]["caption"] == record["txt"]


def test_packing_twice_gives_the_same_bytes(tmp_path):
    source = open_source("sklearn:digits", **PLAIN)
    for folder in ("a", "b"):
        pack(source, str(tmp_path / folder), per_shard=700, heldout=97, shuffle=5)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert list(digest(tmp_path / "a")) == [
        "dataset.json",
        "heldout-000000.tar",
        *(f"train-{n:06d}.tar" for n in range(3)),
    ]
    pack(source, str(tmp_path / "c"), per_shard=700, heldout=97, shuffle=6)
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_shards_packed_anew_hold_the_same_samples(tmp_path):
    source = open_source("embedded:digits8/train-*.tar", **PLAIN)
    pack(source, str(tmp_path / "again"), per_shard=400, heldout=0, shuffle=None)
    again = open_source(f"{tmp_path}/again/train-*.tar", **PLAIN)
    assert len(again) == len(source) == 1500
    for number in (0, 399, 400, 749, 750, 1499):
        assert again[number] == source[number]


def test_an_npz_is_packed_pixel_by_pixel(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(7))
    source = open_source(str(tmp_path / "x.npz"), **PLAIN)
    pack(source, str(tmp_path / "out"), per_shard=3, heldout=2, shuffle=None)
    pixels, labels = decoded(str(tmp_path / "out/train-000001.tar"))
    assert np.array_equal(pixels, images[3:5])
    assert labels.tolist() == [3, 4]
    assert np.array_equal(decoded(str(tmp_path / "out/heldout-000000.tar"))[0], images[5:])


def test_packing_writes_to_any_storage(tmp_path):
    source = open_source("sklearn:digits", **PLAIN)
    written = pack(source, "memory://packed/x", per_shard=1000, heldout=97, shuffle=None)
    pack(source, str(tmp_path), per_shard=1000, heldout=97, shuffle=None)
    assert [one.path for one in written] == [
        f"memory://packed/x/{name}" for name in ("train-000000.tar", "train-000001.tar", "heldout-000000.tar")
    ]  # fmt: skip
    assert read_description("memory://packed/x") == read_description(str(tmp_path))
    assert [sha256_of(one.path) for one in written] == [one.sha256 for one in written]
    with pytest.raises(UserError, match=r"packed/x/train-000000\.tar: shards are in the way"):
        pack(source, "memory://packed/x", per_shard=1000, heldout=97, shuffle=None)


def test_a_key_in_two_shards_is_not_packed_twice(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", [*sample(name, 1), *sample("0007", 1)])
    with pytest.raises(UserError, match=r"b\.tar: sample 0007 is also in .*a\.tar"):
        open_source(f"{tmp_path}/*.tar", **PLAIN)


def test_an_interrupted_packing_is_not_taken_for_a_data_set(tmp_path):
    code = f"""
import os, signal
from data_pipeline.pack import open_source, pack
source = open_source("sklearn:digits", label_field=None, caption_field=None, image_field="image")
get = type(source).__getitem__
type(source).__getitem__ = lambda s, n: os.kill(os.getpid(), signal.SIGKILL) if n == 50 else get(s, n)
pack(source, {str(tmp_path)!r}, per_shard=20, heldout=0, shuffle=None)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(expand(f"{tmp_path}/train-*.tar")) == 2
    (problem,) = verify(f"{tmp_path}/train-*.tar", classes=None).problems
    assert "flowmill data pack has not ended here" in problem
    with pytest.raises(UserError, match="flowmill data pack has not ended here"):
        Samples(f"{tmp_path}/train-*.tar", classes=10)
    source = open_source("sklearn:digits", **PLAIN)
    with pytest.raises(UserError, match="packing into it was interrupted"):
        pack(source, str(tmp_path), per_shard=20, heldout=0, shuffle=None)


BAD_MEMBERS = {
    "label -1 must lie in 0": [("a.png", b"x"), ("a.cls", b"-1")],
    "caption is not UTF-8": [("a.png", b"x"), ("a.txt", b"caf\xe9")],
    "line end": [("a\nb.png", b"x")],
}


@pytest.mark.parametrize("words", BAD_MEMBERS)
def test_a_sample_that_nobody_could_read_leaves_no_shards(tmp_path, words):
    good = [member for n in range(4) for member in sample(f"0{n}", n)]
    source = open_source(write_tar(tmp_path / "s.tar", [*good, *BAD_MEMBERS[words]]), **PLAIN)
    with pytest.raises(UserError, match=words):
        pack(source, str(tmp_path / "out"), per_shard=2, heldout=0, shuffle=None)
    assert list((tmp_path / "out").iterdir()) == []


def npz(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def npy(path: Path, array: np.ndarray) -> str:
    with path.open("wb") as file:
        np.save(file, array)
    return str(path)


def test_what_cannot_be_packed_is_said(tmp_path):
    folder = tmp_path / "out"
    good = np.zeros((3, 4, 4), np.uint8)
    bad = {
        "float64": npz(tmp_path / "a.npz", images=good / 1.0, labels=np.arange(3)),
        "one integer an image": npz(tmp_path / "b.npz", images=good, labels=np.arange(2)),
        "arrays `images` and `labels`": npz(tmp_path / "c.npz", pixels=good),
        "without a pixel": npz(
            tmp_path / "e.npz", images=np.zeros((3, 0, 4), np.uint8), labels=np.arange(3)
        ),
        "it is one array": npy(tmp_path / "f.npz", good),
        "holds no samples": npz(tmp_path / "g.npz", images=good[:0], labels=np.arange(0)),
        "no file at that place": str(tmp_path / "nosuch.csv"),
        "Object arrays": npz(tmp_path / "d.npz", images=good, labels=np.array([{}] * 3)),
        "absent.npz": str(tmp_path / "absent.npz"),
        "cannot be packed": str(tmp_path / "x.zip"),
        "no shard": str(tmp_path / "x-*.tar"),
    }
    for words, name in bad.items():
        with pytest.raises(UserError, match=words) as caught:
            open_source(name, **PLAIN)
        assert name in str(caught.value)
    digits = open_source("sklearn:digits", **PLAIN)
    with pytest.raises(UserError, match="cannot hold out 1797 of 1797 samples"):
        pack(digits, str(folder), per_shard=5, heldout=1797, shuffle=None)
    plain = open_source(write_tar(tmp_path / "p.tar", sample("0", 1)), **PLAIN)
    pack(plain, str(folder), per_shard=5, heldout=0, shuffle=None)
    before = digest(folder)
    with pytest.raises(UserError, match=r"train-000000\.tar: shards are in the way"):
        pack(plain, str(folder), per_shard=5, heldout=0, shuffle=None)
    assert digest(folder) == before


@pytest.mark.parametrize(
    "content", [b"{", b"[" * 100_000, b"[]", json.dumps({"other": 1}).encode(), None]
)
def test_json_without_the_wanted_field_is_named(tmp_path, content):
    members = sample("0007", 1) + ([("0007.json", content)] if content else [])
    url = write_tar(tmp_path / "a.tar", members)
    source = open_source(url, label_field="kind", caption_field=None, image_field="image")
    with pytest.raises(UserError, match=r"a\.tar: sample 0007: its \.json has no readable kind"):
        source[0]


def test_embedded_images_need_no_conversion():
    for name, mode in (("digits28", "L"), ("emoji64", "RGB"), ("digits8", "L")):
        contents = Samples(f"embedded:{name}/heldout-000000.tar", classes=None)
        every = np.arange(len(contents))
        images = contents.read(np.zeros_like(every), every).images
        assert {Image.open(io.BytesIO(image)).mode for image in images} == {mode}


@pytest.mark.parametrize(("name", "classes"), [("digits28", 10), ("emoji64", 9), ("digits8", 10)])
def test_embedded_shards_are_those_of_their_description(name, classes):
    urls = expand(f"embedded:{name}/*.tar")
    about = read_description(folder_of(urls[0]))
    found = {Path(url).name: sha256_of(url) for url in urls}
    assert {shard: facts.sha256 for shard, facts in about.shards.items()} == found
    assert len(about.class_names) == classes
