"""The cache gives the bytes of the shard, asks for each block once, and never grows past its limit,
whoever is killed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from data_pipeline import cache as cache_module
from data_pipeline.cache import BlockCache
from flows.errors import UserError
from tests.data_pipeline.conftest import reach

BLOCK = 4096


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache_module, "BLOCK_BYTES", BLOCK)


def write_shard(path: Path, size: int) -> tuple[str, bytes]:
    content = np.random.default_rng(size).bytes(size)
    path.write_bytes(content)
    return str(path), content


def held(folder: Path) -> int:
    """Bytes of blocks, as a look into the folder finds them."""
    total = 0
    for entry in os.scandir(folder / "blocks"):
        try:
            total += 0 if entry.name.endswith(".partial") else entry.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_ranges_across_blocks_are_the_shards_bytes(tmp_path, small_blocks):
    url, content = write_shard(tmp_path / "a.tar", 5 * BLOCK + 77)
    blocks = BlockCache(tmp_path / "cache", 100 * BLOCK)
    draw = np.random.default_rng(0)
    for _ in range(2):
        for start, size in draw.integers(0, 3 * BLOCK, (60, 2)).tolist():
            assert blocks.read(url, start, start + size) == content[start : start + size]
    assert blocks.read(url, 5 * BLOCK, 6 * BLOCK) == content[5 * BLOCK :]
    assert held(tmp_path / "cache") == len(content)


def test_a_block_is_fetched_once_for_all_ranks(tmp_path, small_blocks, monkeypatch):
    url, content = write_shard(tmp_path / "a.tar", 3 * BLOCK)
    asked = []
    real = cache_module.fetch
    monkeypatch.setattr(cache_module, "fetch", lambda *a, **k: (asked.append(a), real(*a, **k))[1])
    for _ in range(3):
        blocks = BlockCache(tmp_path / "cache", 100 * BLOCK)
        assert blocks.read(url, 0, 3 * BLOCK) == content
    assert len(asked) == 3


def test_a_changed_shard_is_fetched_anew(tmp_path, small_blocks):
    url, content = write_shard(tmp_path / "a.tar", BLOCK)
    assert BlockCache(tmp_path / "cache", 9 * BLOCK).read(url, 0, BLOCK) == content
    changed = bytes(BLOCK)
    Path(url).write_bytes(changed)
    os.utime(url, (1, 1))
    assert BlockCache(tmp_path / "cache", 9 * BLOCK).read(url, 0, BLOCK) == changed


def test_damaged_blocks_are_fetched_anew(tmp_path, small_blocks):
    url, content = write_shard(tmp_path / "a.tar", 2 * BLOCK)
    blocks = BlockCache(tmp_path / "cache", 9 * BLOCK)
    blocks.read(url, 0, 2 * BLOCK)
    for path in (tmp_path / "cache" / "blocks").iterdir():
        path.write_bytes(path.read_bytes()[:10])
    assert blocks.read(url, 0, 2 * BLOCK) == content


def test_the_blocks_not_used_for_longest_go_first(tmp_path, small_blocks):
    url, _ = write_shard(tmp_path / "a.tar", 20 * BLOCK)
    blocks = BlockCache(tmp_path / "cache", 10 * BLOCK)
    for number in range(20):
        blocks.read(url, 0, 10)
        blocks.read(url, number * BLOCK, number * BLOCK + 10)
        assert held(tmp_path / "cache") <= 10 * BLOCK
        time.sleep(0.002)
    left = sorted(int(p.name[-6:]) for p in (tmp_path / "cache" / "blocks").iterdir())
    assert left[0] == 0
    assert left[1:] == list(range(left[1], 20))
    assert len(left) >= 8


@pytest.mark.parametrize("left", [b"", b"12", b"what is this, no number", b"\xff" * 40])
def test_the_bound_holds_when_the_count_is_lost(tmp_path, small_blocks, left):
    url, content = write_shard(tmp_path / "a.tar", 20 * BLOCK)
    for part in range(5):
        blocks = BlockCache(tmp_path / "cache", 6 * BLOCK)
        assert (
            blocks.read(url, part * BLOCK, (part + 3) * BLOCK)
            == (content[part * BLOCK : (part + 3) * BLOCK])
        )
        assert held(tmp_path / "cache") <= 6 * BLOCK
        (tmp_path / "cache" / "locks" / "usage").write_bytes(left)
    blocks.read(url, 0, 20 * BLOCK)
    assert held(tmp_path / "cache") <= 6 * BLOCK


def test_the_count_is_a_number_at_any_time(tmp_path, small_blocks, monkeypatch):
    """A rank that is killed between any two system calls leaves it whole."""
    url, _ = write_shard(tmp_path / "a.tar", 8 * BLOCK)
    blocks = BlockCache(tmp_path / "cache", 6 * BLOCK)
    blocks.read(url, 0, 2 * BLOCK)
    usage = tmp_path / "cache" / "locks" / "usage"
    seen = []
    for name in ("ftruncate", "pwrite"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, f=real: (f(*a), seen.append(usage.read_bytes()))[0]
        )
    blocks.read(url, 2 * BLOCK, 8 * BLOCK)
    assert [int(text) > 2 * BLOCK for text in seen] == [True] * 6


def test_a_cache_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir = .*file/x cannot be written"):
        BlockCache(tmp_path / "file" / "x", 1 << 30)
    with pytest.raises(UserError, match=r"data\.cache_bytes = 5 is less than one block"):
        BlockCache(tmp_path / "x", 5)


def read_for_ever(folder: str, urls: list[str], contents: list[bytes], ready, seed: int) -> None:
    cache_module.BLOCK_BYTES = BLOCK
    blocks = BlockCache(Path(folder), 6 * BLOCK)
    draw = np.random.default_rng(seed)
    count = 0
    while True:
        which, start, size = draw.integers(0, [len(urls), 8 * BLOCK, 2 * BLOCK]).tolist()
        got = blocks.read(urls[which], start, start + size)
        if got != contents[which][start : start + size]:
            os._exit(3)
        count += 1
        ready[seed] = count


def test_ranks_that_share_it_and_are_killed_leave_it_whole(tmp_path):
    shards = [write_shard(tmp_path / f"{n}.tar", 8 * BLOCK + n) for n in range(3)]
    urls, contents = (list(part) for part in zip(*shards, strict=True))
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", 4)
    folder = tmp_path / "cache"
    ranks = [
        context.Process(
            target=read_for_ever, args=(str(folder), urls, contents, counts, n), daemon=True
        )
        for n in range(3)
    ]
    for rank in ranks:
        rank.start()
    try:
        wait_for(lambda: min(counts[:3]) > 5)
        for victim in (0, 1):
            os.kill(ranks[victim].pid, signal.SIGKILL)
            before = counts[2]
            wait_for(lambda before=before: counts[2] > before + 40)
            assert held(folder) <= 6 * BLOCK
        assert ranks[2].is_alive()
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_loader_reads_through_the_cache(tmp_path, shards):
    """Shards taken away after the first epoch are not missed in the second."""
    from data_pipeline.samples import Samples
    from data_pipeline.storage import resolve

    local = Samples(shards([5, 6]), classes=10)
    for url in local.urls:
        place = resolve(f"memory://cached/{Path(url).name}")
        place.storage.pipe_file(place.path, Path(url).read_bytes())
    reach(cache_dir=tmp_path / "cache", cache_bytes=1 << 30)
    remote = Samples("memory://cached/*.tar", classes=10)
    where = np.array([0, 1, 1]), np.array([4, 0, 5])
    first = remote.read(*where)
    for url in remote.urls:
        resolve(url).storage.pipe_file(resolve(url).path, b"")
    assert remote.read(*where).images == first.images == local.read(*where).images
    remote.close()
