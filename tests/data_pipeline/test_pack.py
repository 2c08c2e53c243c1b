"""Packing is deterministic and changes no pixel; what it makes, plain `webdataset` reads."""

import hashlib
import io
import json
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
        pack(source, tmp_path / folder, per_shard=700, heldout=97, shuffle=5)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert list(digest(tmp_path / "a")) == [
        "dataset.json",
        "heldout-000000.tar",
        *(f"train-{n:06d}.tar" for n in range(3)),
    ]
    pack(source, tmp_path / "c", per_shard=700, heldout=97, shuffle=6)
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_shards_packed_anew_hold_the_same_samples(tmp_path):
    source = open_source("embedded:digits8/train-*.tar", **PLAIN)
    pack(source, tmp_path / "again", per_shard=400, heldout=0, shuffle=None)
    again = open_source(f"{tmp_path}/again/train-*.tar", **PLAIN)
    assert len(again) == len(source) == 1500
    for number in (0, 399, 400, 749, 750, 1499):
        assert again[number] == source[number]


def test_an_npz_is_packed_pixel_by_pixel(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(7))
    source = open_source(str(tmp_path / "x.npz"), **PLAIN)
    pack(source, tmp_path / "out", per_shard=3, heldout=2, shuffle=None)
    pixels, labels = decoded(str(tmp_path / "out/train-000001.tar"))
    assert np.array_equal(pixels, images[3:5])
    assert labels.tolist() == [3, 4]
    assert np.array_equal(decoded(str(tmp_path / "out/heldout-000000.tar"))[0], images[5:])


def npz(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_what_cannot_be_packed_is_said(tmp_path):
    folder = tmp_path / "out"
    good = np.zeros((3, 4, 4), np.uint8)
    bad = {
        "float64": npz(tmp_path / "a.npz", images=good / 1.0, labels=np.arange(3)),
        "one integer an image": npz(tmp_path / "b.npz", images=good, labels=np.arange(2)),
        "arrays `images` and `labels`": npz(tmp_path / "c.npz", pixels=good),
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
        pack(digits, folder, per_shard=5, heldout=1797, shuffle=None)
    plain = open_source(write_tar(tmp_path / "p.tar", sample("0", 1)), **PLAIN)
    pack(plain, folder, per_shard=5, heldout=0, shuffle=None)
    before = digest(folder)
    with pytest.raises(UserError, match=r"train-000000\.tar: shards are in the way"):
        pack(plain, folder, per_shard=5, heldout=0, shuffle=None)
    assert digest(folder) == before


@pytest.mark.parametrize("content", [b"{", b"[]", json.dumps({"other": 1}).encode(), None])
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
