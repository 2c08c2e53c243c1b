"""Samples come back as they were packed, from any storage, or one sentence names the one that
cannot."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.reader import Range, RangeReader
from data_pipeline.samples import Samples
from data_pipeline.storage import resolve
from flows.errors import UserError
from tests.data_pipeline.conftest import grey, sample, write_tar


def test_samples_by_shard_and_number(shards):
    contents = Samples(shards([3, 0, 4]), classes=10)
    assert contents.sizes == (3, 0, 4)
    shard, number = np.array([2, 0, 2]), np.array([3, 1, 0])
    encoded = contents.read(shard, number)
    assert encoded.images == [grey(6), grey(1), grey(3)]
    assert encoded.labels.tolist() == [6, 1, 3]
    assert contents.keys(shard, number) == ["train-02/0006", "train-00/0001", "train-02/0003"]


def test_every_storage_gives_the_same_bytes(shards, tmp_path):
    local = Samples(shards([5, 6]), classes=None)
    for url in local.urls:
        place = resolve(f"memory://same/{Path(url).name}")
        place.storage.pipe_file(place.path, Path(url).read_bytes())
    remote = Samples("memory://same/*.tar", classes=None)
    where = np.array([1, 0, 1, 0]), np.array([5, 4, 0, 0])
    assert remote.read(*where).images == local.read(*where).images
    assert remote.keys(*where) == local.keys(*where)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("0007.png", grey(1))], "sample 0007 has no label"),
        ([("0007.cls", b"1")], "sample 0007 has no image"),
        ([("0007.jpg", b"x"), *sample("0007", 1)], "sample 0007 has 2 image members"),
        (sample("0007", 1, "cat"), r"sample 0007: label b'cat' is not an integer"),
        (sample("0007", 1, ""), "sample 0007: label b'' is not an integer"),
        (sample("0007", 1, "1.5"), "not an integer"),
        (sample("0007", 1, 10), r"sample 0007: label 10 must lie in 0 \.\. 9"),
        (sample("0007", 1, "1_0"), r"sample 0007: label b'1_0' is not an integer"),
        (sample("0007", 1, 2**64), r"sample 0007: label 18446744073709551616 must lie in 0 \.\. 9"),
        (sample("0007", 1, -1), r"sample 0007: label -1 must lie in 0 \.\. 9"),
    ],
)
def test_a_bad_sample_is_named(tmp_path, members, words):
    url = write_tar(tmp_path / "bad.tar", [*sample("0000", 0), *members])
    with pytest.raises(UserError, match=words) as caught:
        Samples(url, classes=10).read(np.array([0, 0]), np.array([0, 1]))
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_samples_at_all_is_said(tmp_path):
    with pytest.raises(UserError, match=r"empty\.tar: the shards hold no samples"):
        Samples(write_tar(tmp_path / "empty.tar", []), classes=10)


def test_a_shard_that_shrinks_or_goes_is_named(shards):
    contents = Samples(shards([4, 4]), classes=10)
    first, second = contents.urls
    Path(first).write_bytes(Path(first).read_bytes()[:600])
    with pytest.raises(UserError, match=r"train-00\.tar: ends before byte"):
        contents.read(np.array([0]), np.array([3]))
    Path(second).unlink()
    with pytest.raises(UserError, match=r"train-01\.tar: the shard can no longer be read"):
        contents.read(np.array([1]), np.array([0]))


def test_more_shards_than_files_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.reader.KEPT_FILES", 2)
    reader = RangeReader()
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 3)
    ranges = [Range(str(tmp_path / str(n % 5)), 1, 2) for n in range(12)]
    assert reader.read(ranges) == [bytes([n % 5]) * 2 for n in range(12)]
    reader.close()
    assert reader.read(ranges[:1]) == [b"\0\0"]
    reader.close()
