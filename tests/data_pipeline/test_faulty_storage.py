"""An epoch from object storage that fails, cuts and stalls is the epoch without faults, sample by
sample."""

import os
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from data_pipeline import storage
from data_pipeline.indexes import update_catalogs
from data_pipeline.loader import Loader
from data_pipeline.reader import Range, RangeReader
from data_pipeline.shards import expand
from data_pipeline.share import Share
from data_pipeline.stream import open_stream
from flows.errors import UserError
from tests.data_pipeline.conftest import image_file, reach, write_tar
from tests.data_pipeline.faulty import Proxy, s3_server
from tests.data_pipeline.test_loader import CPU, FLIPPED, decoder

RATES = {"503": 0.05, "cut": 0.02, "stall": 0.01}
KEY = {"key": "flowmill-key", "secret": "flowmill-secret"}


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server() as address:
        yield address


def s3_options(address):
    # The driver would try again by itself; here it is Flowmill's patience that is tested.
    alone = {"config_kwargs": {"retries": {"max_attempts": 0}}}
    return {"s3": {"endpoint_url": address, **KEY, **alone}}


def upload(server, folder, bucket):
    remote = fsspec.filesystem("s3", **s3_options(server)["s3"])
    remote.mkdir(bucket)
    for path in sorted(folder.glob("*")):
        remote.put_file(str(path), f"{bucket}/{path.name}")


def write_set(folder: Path, sizes):
    """Shards of noise, so that no two images are alike and a cut one is not whole."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            pixels = draw.integers(0, 256, (24, 24), np.uint8)
            members += [(f"{number:05d}.png", image_file(pixels))]
            members += [(f"{number:05d}.cls", str(number % 10).encode())]
            number += 1
        write_tar(folder / f"train-{shard:03d}.tar", members)


def epoch(pattern, batches, *, ranks, batch=12):
    """Keys, labels and pixels of the first batches, all ranks' shares put together."""
    shares = []
    for rank in range(ranks):
        stream = open_stream([(pattern, 1.0)], keep={}, classes=10, seed=3, lanes=5, window=16)
        share = Share(
            stream, decoder(), size=(24, 24), augment=FLIPPED, seed=3, batch=batch, rank=rank,
            ranks=ranks, device=CPU,
        )  # fmt: skip
        loader = Loader(share, prefetch=2)
        shares.append([next(loader) for _ in range(batches)])
        keys = stream.keys(torch.arange(batches * batch))
        loader.close()
    every = [
        torch.cat(parts) for parts in zip(*[[b.image for b in s] for s in shares], strict=True)
    ]
    labels = [
        torch.cat(parts) for parts in zip(*[[b.label for b in s] for s in shares], strict=True)
    ]
    return keys, torch.cat(labels), torch.cat(every)


def compare(server, tmp_path, monkeypatch, sizes, *, ranks, bucket):
    # Small files: without this a shard would be one request.
    monkeypatch.setattr("data_pipeline.reader.LARGEST_GAP", 0)
    write_set(tmp_path / "set", sizes)
    upload(server, tmp_path / "set", bucket)
    batches = sum(sizes) // 12
    local = epoch(f"{tmp_path}/set/train-*.tar", batches, ranks=1)
    assert len(set(local[0])) == sum(sizes)
    with Proxy(server, RATES) as proxy:
        reach(options=s3_options(proxy.url), timeout=1.0, attempts=6)
        far = epoch(f"s3://{bucket}/train-*.tar", batches, ranks=ranks)
        assert proxy.seen["GET"] >= sum(sizes) // 2
        assert min(proxy.seen[fault] for fault in RATES) > 0
    assert far[0] == local[0]
    assert torch.equal(far[1], local[1])
    assert torch.equal(far[2], local[2])


def test_an_epoch_through_faults_is_the_epoch_without(server, tmp_path, monkeypatch):
    compare(server, tmp_path, monkeypatch, [40, 31, 52, 27, 30], ranks=1, bucket="quick")


@pytest.mark.slow
def test_a_long_epoch_through_faults_on_three_ranks(server, tmp_path, monkeypatch):
    compare(server, tmp_path, monkeypatch, [97] * 11 + [133], ranks=3, bucket="long")


def test_storage_that_stays_broken_is_named_in_one_sentence(server, tmp_path):
    write_set(tmp_path / "set", [3])
    upload(server, tmp_path / "set", "broken")
    url = "s3://broken/train-000.tar"
    sentences = {
        "503": (10.0, r"can no longer be read \(.*ServiceUnavailable.*\)"),
        "cut": (10.0, r"can no longer be read \(Response payload is not completed.*\)"),
        "stall": (0.5, r"can no longer be read \(no answer within 0\.5 s\)"),
    }
    for fault, (timeout, words) in sentences.items():
        with Proxy(server, {fault: 1.0}) as proxy:
            reach(options=s3_options(proxy.url), timeout=timeout, attempts=1)
            reader = RangeReader()
            with pytest.raises(UserError, match=words) as caught:
                reader.read([Range(url, 512, 100)])
            assert str(caught.value).startswith(url)
            assert "\n" not in str(caught.value)
            reader.close()
    reach(options=s3_options("http://127.0.0.1:9"), timeout=5.0, attempts=1)
    with pytest.raises(UserError, match=r"Could not connect to the endpoint URL"):
        expand("s3://broken/*.tar")


def test_what_is_missing_or_forbidden_is_not_asked_for_again(server, tmp_path):
    write_set(tmp_path / "set", [1])
    upload(server, tmp_path / "set", "present")
    with Proxy(server, {}) as proxy:
        reach(options=s3_options(proxy.url), timeout=5.0, attempts=6)
        storage.fetch("s3://present/train-000.tar", 0, 10)
        before = proxy.seen["GET"]
        with pytest.raises(FileNotFoundError):
            storage.fetch("s3://present/absent.tar", 0, 10)
        assert proxy.seen["GET"] == before + 1


def test_a_bucket_that_is_not_there_has_one_answer(server):
    reach(options=s3_options(server), timeout=5.0, attempts=1)
    for name in ("*.tar", "0.tar", "{00..40}.tar"):
        with pytest.raises(UserError, match=r"there is no shard .*at that place; check the path"):
            expand(f"s3://nowhere-at-all/{name}")


def test_an_index_lies_in_the_bucket_and_spares_every_run_the_headers(server, tmp_path):
    write_set(tmp_path / "set", [20, 5, 9])
    upload(server, tmp_path / "set", "indexed")
    with Proxy(server, {}) as proxy:
        reach(options=s3_options(proxy.url), timeout=5.0, attempts=2)
        done = update_catalogs("s3://indexed/train-{000..002}.tar")
        assert (done.files, done.made) == (["s3://indexed/flowmill.index"], 3)
    with Proxy(server, {}) as proxy:
        reach(options=s3_options(proxy.url), timeout=5.0, attempts=2)
        stream = open_stream(
            [("s3://indexed/*.tar", 1.0)], keep={}, classes=10, seed=0, lanes=2, window=4
        )
        assert stream.samples == 34
        # A listing, and head and table of the index: nothing of any shard.
        assert proxy.seen["GET"] <= 4
        stream.close()


def test_secrets_are_in_no_message(server, monkeypatch):
    reach(options=s3_options(server), hidden=frozenset(KEY.values()), timeout=5.0, attempts=1)
    error = OSError(f"signature of {KEY['key']} with {KEY['secret']} is wrong")
    assert storage.describe(error) == "signature of *** with *** is wrong"
    assert KEY["secret"] not in repr(storage.access())
    assert os.environ.get("AWS_SECRET_ACCESS_KEY") is None
