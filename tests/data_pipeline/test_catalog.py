"""One index file a folder: right, incremental, resumable, and no burden on whoever opens many shards."""

import io
import os
import subprocess
import sys
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec import AbstractFileSystem

from data_pipeline import index as index_module
from data_pipeline import indexes as indexes_module
from data_pipeline.catalog import NAME, Row, Summary, open_catalog, open_catalogs, write_catalog
from data_pipeline.index import cached_at, open_index, scan, signature_of
from data_pipeline.indexes import Indexes, update_catalogs
from data_pipeline.samples import Samples
from data_pipeline.shards import find
from data_pipeline.storage import Facts
from data_pipeline.stream import open_stream
from data_pipeline.wds2idx import import_idx
from flows.errors import UserError
from tests.data_pipeline.conftest import reach, sample, write_tar


@pytest.fixture
def scans(monkeypatch):
    """The shards that are read to be indexed."""
    seen = []
    real = index_module.scan
    monkeypatch.setattr(index_module, "scan", lambda url: seen.append(Path(url).name) or real(url))
    return seen


def same(one, two):
    assert one.keys.tolist() == two.keys.tolist()
    assert one.extensions == two.extensions
    assert np.array_equal(one.offsets, two.offsets)
    assert np.array_equal(one.sizes, two.sizes)


def test_a_catalog_says_of_each_shard_what_its_headers_say(shards, scans):
    pattern = shards([3, 0, 5])
    done = update_catalogs(pattern)
    assert (done.made, done.kept, done.problems) == (3, 0, [])
    assert sorted(scans) == ["train-00.tar", "train-01.tar", "train-02.tar"]
    scans.clear()
    found = find(pattern)
    indexes = Indexes(found)
    every = [indexes[shard.url] for shard in found]
    assert [summary.samples for summary in indexes.summaries.values()] == [3, 0, 5]
    assert scans == []
    for index in every:
        same(index, scan(index.url))
    assert not cached_at(found[0].url).exists(), "the catalog has it; the cache lets it go"


def test_only_new_and_changed_shards_are_looked_into(shards, scans, tmp_path):
    pattern = shards([2, 3])
    update_catalogs(pattern)
    folder = tmp_path / "data"
    write_tar(folder / "train-02.tar", sample("0009", 1))
    write_tar(folder / "train-00.tar", sample("0008", 1))
    os.utime(folder / "train-00.tar", (1, 1))
    scans.clear()
    done = update_catalogs(pattern)
    assert sorted(scans) == ["train-00.tar", "train-02.tar"]
    assert (done.made, done.kept) == (2, 1)
    assert Samples(pattern, classes=None).sizes == (1, 3, 1)
    scans.clear()
    assert update_catalogs(pattern).kept == 3
    assert scans == []


def test_two_patterns_of_a_folder_share_its_catalog(shards, tmp_path, scans):
    pattern = shards([2])
    write_tar(tmp_path / "data" / "heldout-00.tar", sample("0009", 1))
    update_catalogs(pattern)
    update_catalogs(f"{tmp_path}/data/heldout-*.tar")
    scans.clear()
    assert Samples(f"{tmp_path}/data/*.tar", classes=None).sizes == (1, 2)
    assert scans == []


def test_indexing_that_was_interrupted_goes_on_where_it_was(shards, scans, monkeypatch):
    pattern = shards([1] * 6)
    monkeypatch.setattr(indexes_module, "MADE_AT_ONCE", 2)
    reach(requests=1)
    real = indexes_module.open_index

    def interrupt(url, known):
        if url.endswith("04.tar"):
            raise KeyboardInterrupt
        return real(url, known)

    monkeypatch.setattr(indexes_module, "open_index", interrupt)
    with pytest.raises(KeyboardInterrupt):
        update_catalogs(pattern)
    monkeypatch.setattr(indexes_module, "open_index", real)
    assert {f"train-0{n}.tar" for n in range(4)} <= set(scans)
    scans.clear()
    assert update_catalogs(pattern).made == 6
    assert set(scans) <= {"train-04.tar", "train-05.tar"}


def test_bad_shards_are_reported_and_the_others_indexed(shards, tmp_path):
    pattern = shards([2, 2, 2])
    (tmp_path / "data" / "train-01.tar").write_bytes(b"<html>404</html>" * 100)
    done = update_catalogs(pattern)
    assert done.made == 2
    assert len(done.problems) == 1
    assert "train-01.tar: not a whole uncompressed tar" in done.problems[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_catalog_counts_for_nothing(shards, tmp_path, scans, damage):
    pattern = shards([2, 3])
    update_catalogs(pattern)
    file = tmp_path / "data" / NAME
    content = bytearray(file.read_bytes())
    content[100] ^= 0xFF
    file.write_bytes(
        {"cut": content[:90], "flipped": content, "empty": b"", "text": b"x" * 99}[damage]
    )
    open_catalogs.cache_clear()
    assert open_catalog(str(file)) is None
    scans.clear()
    assert Samples(pattern, classes=None).sizes == (2, 3)
    assert len(scans) == 2


def test_an_index_damaged_inside_a_catalog_is_made_again(shards, tmp_path, scans):
    pattern = shards([2, 3])
    update_catalogs(pattern)
    file = tmp_path / "data" / NAME
    content = bytearray(file.read_bytes())
    content[-20] ^= 0xFF
    file.write_bytes(content)
    open_catalogs.cache_clear()
    scans.clear()
    found = find(pattern)
    indexes = Indexes(found)
    for shard in found:
        same(indexes[shard.url], scan(shard.url))
    assert scans == ["train-01.tar"]


def test_where_nothing_may_be_written_the_users_cache_holds_the_catalog(shards, monkeypatch):
    pattern = shards([2, 3])
    real = indexes_module.write_catalog.__globals__["_put"]

    def refuse(source, target):
        if "/data/" in target:
            raise PermissionError(13, "Permission denied")
        return real(source, target)

    monkeypatch.setitem(indexes_module.write_catalog.__globals__, "_put", refuse)
    done = update_catalogs(pattern)
    assert "/data/" not in done.files[0]
    assert update_catalogs(pattern).kept == 2


def test_a_shard_that_another_program_indexed_is_not_read(tmp_path, scans):
    members = [m for n in range(20) for m in sample(f"{n:04d}", n)]
    url = write_tar(tmp_path / "a.tar", members)
    if find_spec("wds2idx") is None:
        pytest.skip("DALI's wds2idx is not installed")
    command = [sys.executable, "-m", "wds2idx", url, f"{tmp_path}/a.idx"]
    subprocess.run(command, capture_output=True, check=True)
    found = open_index(url)
    assert scans == []
    same(found, scan(url))
    known = find(url)[0].facts
    good = Path(tmp_path / "a.idx").read_text()
    for wrong in (
        good.replace("v1.2", "v1.1"),
        good.replace(" 0003.png", " 0004.png"),
        "\n".join(good.splitlines()[:-1]),
        good.replace("cls", "cls x"),
        "",
        good.replace(good.split()[3], "1"),
    ):
        (tmp_path / "a.idx").write_text(wrong)
        cached_at(url).unlink()
        scans.clear()
        same(open_index(url), found)
        assert len(scans) == 1
    (tmp_path / "a.idx").write_text(good)
    os.utime(tmp_path / "a.idx", (1, 1))
    assert import_idx(url, known) is None, "older than its shard"


class Synthetic(AbstractFileSystem):
    """A storage with one folder of shards that are listed and never read, and their catalog."""

    protocol = "synthetic"
    cachable = False
    shards = 0
    catalog = b""
    read = 0

    def ls(self, path, detail=True, **_):
        listed = [
            {"name": f"set/train-{n:06d}.tar", "size": 10**9, "type": "file", "ETag": f"{n:032x}"}
            for n in range(type(self).shards)
        ]
        return listed if detail else [entry["name"] for entry in listed]

    def info(self, path, **_):
        if path == "set":
            return {"name": "set", "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def cat_file(self, path, start=None, end=None, **_):
        if not path.endswith(NAME):
            raise FileNotFoundError(path)
        type(self).read += end - start
        return type(self).catalog[start:end]


@pytest.fixture
def synthetic(tmp_path):
    fsspec.register_implementation("synthetic", Synthetic, clobber=True)

    def make(shards: int, samples: int) -> str:
        folder = tmp_path / f"{shards}-{samples}"
        folder.mkdir()
        rows = [
            Row(
                f"train-{n:06d}.tar",
                signature_of(Facts(10**9, f"{n:032x}")),
                Summary(samples, ("cls", "jpg"), True),
                0,
                40,
                0,
            )
            for n in range(shards)
        ]
        write_catalog(str(folder), rows, io.BytesIO(b"x" * 40))
        open_catalogs.cache_clear()
        Synthetic.shards, Synthetic.read = shards, 0
        Synthetic.catalog = (folder / NAME).read_bytes()
        return "synthetic://set/train-*.tar"

    return make


@pytest.mark.parametrize("named", ["glob", pytest.param("braces", marks=pytest.mark.slow)])
def test_a_hundred_thousand_shards_open_in_seconds(synthetic, named):
    """A thousand million samples; the bound is ten times what a quiet machine takes."""
    pattern = synthetic(100_000, 10_000)
    if named == "braces":
        pattern = "synthetic://set/train-{000000..099999}.tar"
    began = time.process_time()
    stream = open_stream([(pattern, 1.0)], keep={}, classes=10, seed=0, lanes=64, window=256)
    assert time.process_time() - began < 30
    assert stream.samples == 10**9
    assert Synthetic.read < 64 * 100_000, "head and table, not the indexes"
    # And any position is found without an index.
    stream.order.sample_at(np.array([0, 10**9 - 1, 10**12]))


def test_memory_goes_with_the_shards_and_not_with_the_samples(synthetic):
    def peak(shards, samples):
        pattern = synthetic(shards, samples)
        tracemalloc.start()
        open_stream([(pattern, 1.0)], keep={}, classes=10, seed=0, lanes=64, window=256)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    peak(10, 10)
    few, many = peak(2_000, 10), peak(2_000, 100_000)
    assert abs(many - few) < 0.1 * few
    assert few < 2_000 * 3_000
    assert peak(4_000, 10) < 2.5 * few


def test_a_shard_changed_after_the_data_set_was_opened_is_named(shards, tmp_path):
    pattern = shards([4, 4])
    update_catalogs(pattern)
    contents = Samples(pattern, classes=10)
    write_tar(tmp_path / "data" / "train-01.tar", sample("0000", 1))
    with pytest.raises(
        UserError, match=r"train-01\.tar: has 1 samples and had 4 when the run began"
    ):
        contents.read(np.array([1]), np.array([3]))
