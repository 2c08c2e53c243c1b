"""The loader gives each rank its share of the same global batches, ahead of time, from any
position."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from data_pipeline.augment import Augment
from data_pipeline.decode.decoder import open_decoder
from data_pipeline.loader import Loader
from data_pipeline.share import Share
from data_pipeline.stage import Stopped
from data_pipeline.stream import open_stream
from flows.errors import UserError
from tests.data_pipeline.conftest import sample, write_tar

CPU = torch.device("cpu")


PLAIN = Augment("centre", (1.0, 1.0), (1.0, 1.0), flip=0.0)
FLIPPED = replace(PLAIN, flip=0.5)
CROPPED = Augment("random", (0.2, 1.0), (0.5, 2.0), flip=0.5)


def decoder(kind="pillow"):
    return open_decoder(kind, channels=1, threads=1, device=CPU)


def stream_of(pattern, *, keep=None, seed=0, lanes=2, window=3, tolerate=None):
    sources = [(pattern, 1.0)] if isinstance(pattern, str) else pattern
    return open_stream(
        sources,
        keep=keep or {},
        classes=10,
        seed=seed,
        lanes=lanes,
        window=window,
        tolerate=tolerate,
    )


def loader(
    pattern,
    *,
    keep=None,
    batch=6,
    rank=0,
    ranks=1,
    seed=1,
    augment=PLAIN,
    prefetch=2,
    lanes=3,
    window=4,
    size=4,
    kind="pillow",
    tolerate=None,
):
    share = Share(
        stream_of(pattern, keep=keep, seed=seed, lanes=lanes, window=window, tolerate=tolerate),
        decoder(kind),
        size=(size, size),
        augment=augment,
        seed=seed,
        batch=batch,
        rank=rank,
        ranks=ranks,
        device=CPU,
    )
    return Loader(share, prefetch=prefetch)


def loader_threads():
    return [t for t in threading.enumerate() if t.name in ("reader-0", "decoder-0", "decoder-1")]


def numbers(batch):
    """Which sample each image is: they are painted with their number."""
    return torch.round((batch.image.mean((1, 2, 3)) + 1) * 127.5).long().tolist()


def test_an_epoch_is_every_sample_once_with_its_label(shards):
    with loader(shards([5, 7, 8]), batch=4) as batches:
        epochs = [[n for _ in range(5) for n in numbers(next(batches))] for _ in "ab"]
        assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
        assert epochs[0] != epochs[1]
        batch = next(batches)
        assert batch.label.tolist() == [n % 10 for n in numbers(batch)]
        assert batch.position.tolist() == [40, 41, 42, 43]


def test_ranks_share_each_global_batch_whatever_their_number(shards):
    pattern = shards([9, 4, 10])
    with loader(pattern, batch=7) as whole:
        batches = [next(whole) for _ in range(8)]
    for ranks in (2, 3, 7):
        every = [loader(pattern, batch=7, rank=rank, ranks=ranks) for rank in range(ranks)]
        for batch in batches:
            shares = [next(one) for one in every]
            assert torch.equal(torch.cat([s.image for s in shares]), batch.image)
            assert torch.equal(torch.cat([s.position for s in shares]), batch.position)
        for one in every:
            one.close()


def test_resuming_on_another_number_of_ranks_misses_and_repeats_nothing(shards):
    pattern = shards([9, 4, 10])
    with loader(pattern, batch=8) as whole:
        want = [n for _ in range(12) for n in numbers(next(whole))]
    got, state = [], None
    for ranks in (4, 3, 2, 1):
        every = [loader(pattern, batch=8, rank=rank, ranks=ranks) for rank in range(ranks)]
        for one in every:
            if state is not None:
                one.load_state_dict(state)
        for _ in range(3):
            got += [n for one in every for n in numbers(next(one))]
        # Batches that were decoded ahead and not taken do not count.
        state = every[0].state_dict()
        for one in every:
            assert one.state_dict() == state
            one.close()
    assert got == want
    assert state["position"] == 96


def test_a_running_loader_goes_back_to_a_state(shards):
    with loader(shards([20])) as batches:
        next(batches)
        state = batches.state_dict()
        first = next(batches)
        next(batches)
        batches.load_state_dict(state)
        assert torch.equal(next(batches).image, first.image)
        assert len(loader_threads()) == 3


def test_state_of_another_order_is_refused(shards):
    pattern, other = shards([20]), shards([10, 10], "other")
    state = loader(pattern).state_dict()
    assert state.keys() == {"position", "taken", "samples", "fingerprint"}
    for changed in (loader(other), loader(pattern, seed=2), loader(pattern, window=5)):
        with pytest.raises(UserError, match=r"another stream of samples \(20 an epoch, here 20\)"):
            changed.load_state_dict(state)
    loader(pattern, batch=4).load_state_dict(state)


def test_the_same_data_elsewhere_is_the_same_stream(shards, tmp_path):
    pattern = shards([6, 6])
    state = loader(pattern).state_dict()
    (tmp_path / "data").rename(tmp_path / "moved")
    loader(f"{tmp_path}/moved/*.tar").load_state_dict(state)


def test_flipped_images_do_not_depend_on_the_ranks():
    pattern = "embedded:digits8/train-*.tar"
    with (
        loader(pattern, batch=64, size=8) as plain,
        loader(pattern, batch=64, size=8, augment=FLIPPED) as one,
        loader(pattern, batch=64, size=8, augment=FLIPPED, rank=1, ranks=2) as half,
    ):
        straight, flipped = next(plain).image, next(one).image
        assert torch.equal(next(half).image, flipped[32:])
    turned = (flipped == straight.flip(-1)).flatten(1).all(1)
    as_is = (flipped == straight).flatten(1).all(1)
    assert (turned | as_is).all()
    assert 16 < turned.sum() < 48


@pytest.mark.parametrize("ranks", [2, 3])
def test_random_crops_do_not_depend_on_the_ranks_or_the_decoder(ranks):
    pattern = "embedded:digits28/train-000000.tar"
    with loader(pattern, batch=32, size=20, augment=CROPPED) as whole:
        wanted = [next(whole) for _ in range(3)]
    every = [
        loader(pattern, batch=32, size=20, augment=CROPPED, rank=rank, ranks=ranks, kind="auto")
        for rank in range(ranks)
    ]
    for want in wanted:
        shares = [next(one) for one in every]
        assert torch.equal(torch.cat([share.image for share in shares]), want.image)
    for one in every:
        one.close()
    assert not torch.equal(wanted[0].image, wanted[1].image)


def test_prefetching_is_ahead_bounded_and_measured(shards):
    batches = loader(shards([50]), prefetch=3)
    read, decoded = [], []
    real_read, real_decode = batches.share.read, batches.share.decode
    batches.share.read = lambda start: (read.append(start), real_read(start))[1]
    batches.share.decode = lambda some: (
        decoded.append(int(some.positions[0])),
        real_decode(some),
    )[1]
    next(batches)
    assert batches.wait_seconds > 0
    deadline = time.monotonic() + 10
    while len(read) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # One taken, three decoded and the one that was in the making, and as many read.
    assert sorted(decoded) == [0, 6, 12, 18, 24]
    assert read == [*sorted(decoded), 30, 36, 42, 48]
    next(batches)
    assert (batches.queue_depth, batches.read_depth) == (4, 4)
    assert batches.wait_seconds < 0.1
    batches.close()


@pytest.mark.parametrize("end", ["decoded", "closed", "fails"])
def test_the_first_batch_is_decoded_before_others_are_read(shards, end):
    batches = loader(shards([50]))
    read, begun, gate = [], threading.Event(), threading.Event()
    real_read, real_decode = batches.share.read, batches.share.decode

    def decode(some):
        begun.set()
        assert gate.wait(10)
        if end == "fails":
            raise ValueError("cannot be decoded")
        return real_decode(some)

    batches.share.read = lambda start: (read.append(start), real_read(start))[1]
    batches.share.decode = decode
    with ThreadPoolExecutor(2) as pool:
        taken = pool.submit(next, batches)
        assert begun.wait(10)
        time.sleep(0.1)
        assert read == [0]
        closed = pool.submit(batches.close) if end == "closed" else None
        time.sleep(0.1)
        gate.set()
        error = taken.exception(10)
        if closed is not None:
            closed.result(10)
    deadline = time.monotonic() + 10
    while end == "decoded" and len(read) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    batches.close()
    assert type(error) is {"decoded": type(None), "closed": Stopped, "fails": ValueError}[end]
    assert (read == [0]) is (end != "decoded")
    assert not loader_threads()


@pytest.mark.alone
def test_reading_goes_on_while_a_batch_is_decoded(shards):
    """Two things that take 50 ms a batch take 50 ms together, not 100."""
    batches = loader(shards([50]), prefetch=2)
    real_read, real_decode = batches.share.read, batches.share.decode
    batches.share.read = lambda start: (time.sleep(0.05), real_read(start))[1]
    batches.share.decode = lambda some: (time.sleep(0.05), real_decode(some))[1]
    next(batches)
    began = time.perf_counter()
    for _ in range(20):
        next(batches)
    assert time.perf_counter() - began < 20 * 0.1 * 0.8
    batches.close()


def test_a_bad_sample_reaches_the_trainer_by_name_and_no_thread_stays(tmp_path):
    members = [m for n in range(8) for m in sample(f"{n:04d}", n)]
    bad = write_tar(tmp_path / "bad.tar", [*members, ("9999.png", b"zero"), ("9999.cls", b"1")])
    batches = loader(bad, batch=3)
    with pytest.raises(UserError, match=r"bad\.tar: sample 9999: .*not a PNG"):
        list(batches)
    position = batches.position
    with pytest.raises(UserError, match="sample 9999"):
        next(batches)
    assert batches.position == position
    assert not loader_threads()
    batches.close()


def test_closing_and_forgetting_end_the_thread(shards):
    pattern = shards([20])
    closed = loader(pattern)
    next(closed)
    closed.close()
    closed.close()
    assert not loader_threads()
    forgotten = loader(pattern)
    next(forgotten)
    del forgotten
    gc.collect()
    assert not loader_threads()


def test_a_batch_smaller_than_the_ranks_is_refused(shards):
    with pytest.raises(UserError, match=r"train\.batch = 2 gives no sample to some of 3 ranks"):
        loader(shards([9]), batch=2, rank=0, ranks=3)


def test_a_batch_larger_than_the_memory_is_refused(shards):
    with pytest.raises(UserError, match=r"train\.batch gives a rank 50,000,000,000 samples.*lower"):
        loader(shards([9]), batch=10**11, rank=0, ranks=2)


def test_a_data_set_smaller_than_a_batch_repeats_within_it(shards):
    with loader(shards([2, 1]), batch=7) as batches:
        assert sorted(numbers(next(batches))[:6]) == [0, 0, 1, 1, 2, 2]


def test_keys_name_what_is_read(shards):
    stream = stream_of(shards([4, 5]))
    positions = torch.arange(9)
    keys = stream.keys(positions)
    assert sorted(keys) == [f"train-{int(n > 3):02d}/{n:04d}" for n in range(9)]
    labels = stream.read(positions).labels.tolist()
    assert labels == [int(key[-4:]) for key in keys]
