"""An index says what the tar says, is made once, and refuses what is damaged or unsafe by name."""

import os
import resource
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import index as index_module
from data_pipeline.index import cached_at, open_index, scan, split_name
from data_pipeline.remembered import remembered
from data_pipeline.shards import expand
from data_pipeline.storage import resolve
from flows.errors import UserError
from tests.data_pipeline.conftest import grey, sample, write_tar


def test_members_lie_where_the_index_says(tmp_path):
    long = "deep/" * 30 + "0001"
    members = [*sample("0000", 1), (f"{long}.png", grey(2)), (f"{long}.CLS", b"7"), ("NOTES", b"-")]
    url = write_tar(tmp_path / "a.tar", [*members, (".hidden.png", b"-")])
    found = scan(url)
    assert found.keys.tolist() == ["0000", long]
    content = Path(url).read_bytes()
    for name, data in members[:4]:
        key, extension = split_name(name)
        row, column = found.keys.tolist().index(key), found.column(extension)
        start = found.offsets[row, column]
        assert content[start : start + found.sizes[row, column]] == data


def test_an_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    url = write_tar(tmp_path / "a.tar", sample("old", 1))
    scans = []
    real = index_module.scan
    monkeypatch.setattr(index_module, "scan", lambda u: scans.append(u) or real(u))
    for _ in range(3):
        assert open_index(url).keys.tolist() == ["old"]
    assert len(scans) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]  # nothing beside the data
    before = Path(url).stat()
    write_tar(tmp_path / "a.tar", sample("new", 1))
    os.utime(url, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))
    assert Path(url).stat().st_size == before.st_size
    assert open_index(url).keys.tolist() == ["new"]
    assert len(scans) == 2


def test_a_damaged_index_is_made_again(tmp_path):
    url = write_tar(tmp_path / "a.tar", sample("0000", 1))
    open_index(url)
    whole = cached_at(url).read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        cached_at(url).write_bytes(content)
        assert open_index(url).keys.tolist() == ["0000"]
        assert cached_at(url).read_bytes() == whole


def test_storage_that_is_not_local_is_indexed_alike(tmp_path):
    url = write_tar(tmp_path / "a.tar", sample("0000", 1))
    place = resolve("memory://indexed/a.tar")
    place.storage.pipe_file(place.path, Path(url).read_bytes())
    for _ in range(2):
        assert np.array_equal(open_index("memory://indexed/a.tar").offsets, scan(url).offsets)


def special(name: str, kind: bytes, target: str = "") -> list[tuple[tarfile.TarInfo, bytes]]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return [(member, b"")]


def test_a_full_disk_keeps_no_half_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = write_tar(tmp_path / "a.tar", sample("0000", 1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))  # no file grows beyond 16 bytes
    try:
        index = open_index(url)
        ones = remembered(url, "ones", lambda: np.ones(3, np.int64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (len(index), ones.tolist()) == (1, [1, 1, 1])
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("../up.png", b"x")], r"member \.\./up\.png leads outside"),
        ([("/etc/up.png", b"x")], r"member /etc/up\.png leads outside"),
        ([("\udcff.png", b"x")], r"member \\udcff\.png has a name that is not UTF-8"),
        ([("a/../../up.png", b"x")], "leads outside"),
        (special("link.png", tarfile.SYMTYPE, "/etc/passwd"), r"member link\.png is a link"),
        (special("link.png", tarfile.LNKTYPE, "0000.png"), r"member link\.png is a link"),
        (special("null.png", tarfile.CHRTYPE), r"member null\.png is a device"),
        (special("pipe.png", tarfile.FIFOTYPE), r"member pipe\.png is a device"),
        ([("0000.pyd", b"x")], r"member 0000\.pyd is a pickle"),
        ([("0000.latent.pth", b"x")], r"member 0000\.latent\.pth is a pickle"),
        ([("0000.Pickle", b"x")], "is a pickle"),
        (sample("0000", 3), r"duplicate key 0000"),
    ],
)
def test_unsafe_members_are_refused_by_shard_and_name(tmp_path, members, words):
    url = write_tar(tmp_path / "bad.tar", [*sample("0000", 1), *sample("0001", 1), *members])
    with pytest.raises(UserError, match=words) as caught:
        open_index(url)
    assert str(caught.value).startswith(url)
    assert "\n" not in str(caught.value)


def test_damaged_shards_are_refused_by_name(tmp_path):
    whole = Path(write_tar(tmp_path / "a.tar", [*sample("0", 1), *sample("1", 2)])).read_bytes()
    damaged = {
        "in data": whole[: 3 * 512 + 1],
        "in a header": whole[: 2 * 512 + 100],
        "between members": whole[: 4 * 512],
        "header garbled": whole[: 4 * 512] + b"\xff" * 512 + whole[5 * 512 :],
        "joined": whole + whole,
        "compressed": b"\x1f\x8b" + whole[2:],
        "empty": b"",
        "no tar": b"<html>404</html>" * 100,
    }
    for what, content in damaged.items():
        path = tmp_path / "bad.tar"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.tar: ") as caught:
            open_index(str(path))
        assert "\n" not in str(caught.value), what


def test_ten_thousand_samples_are_indexed_fast(tmp_path):
    """A bound that catches work quadratic in members; the speed itself is measured elsewhere."""
    url = write_tar(
        tmp_path / "big.tar",
        [(f"{n:05d}.{e}", b"0") for n in range(10_000) for e in ("png", "cls")],
    )
    began = time.process_time()
    assert len(open_index(url)) == 10_000
    assert time.process_time() - began < 5
    began = time.process_time()
    open_index(url)
    assert time.process_time() - began < 0.5


def test_the_embedded_data_are_indexed_away_from_the_package():
    for url in expand("embedded:digits8/*.tar"):
        open_index(url)
        assert {p.suffix for p in Path(url).parent.iterdir()} <= {".tar", ".md", ".json"}
