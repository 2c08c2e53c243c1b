"""The loader gives each rank its share of the same global batches, ahead of time, from any
position."""

import gc
import threading
import time

import pytest
import torch

from data_pipeline.augment import draw_flips
from data_pipeline.decode.decoder import open_decoder
from data_pipeline.loader import Loader, read_all
from data_pipeline.stream import open_stream
from flows.errors import UserError
from tests.data_pipeline.conftest import sample, write_tar

CPU = torch.device("cpu")


def decoder(kind="pillow", size=4):
    return open_decoder(kind, image_size=size, channels=1, threads=1, device=CPU)


def stream_of(pattern, *, keep=None, seed=0, lanes=2, window=3):
    sources = [(pattern, 1.0)] if isinstance(pattern, str) else pattern
    return open_stream(sources, keep=keep or {}, classes=10, seed=seed, lanes=lanes, window=window)


def loader(
    pattern,
    *,
    keep=None,
    batch=6,
    rank=0,
    ranks=1,
    seed=1,
    flip=0.0,
    prefetch=2,
    lanes=3,
    window=4,
    size=4,
):
    return Loader(
        stream_of(pattern, keep=keep, seed=seed, lanes=lanes, window=window),
        decoder(size=size),
        seed=seed,
        batch=batch,
        rank=rank,
        ranks=ranks,
        flip=flip,
        prefetch=prefetch,
        device=CPU,
    )


def loader_threads():
    return [t for t in threading.enumerate() if t.name == "loader"]


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
        assert len(loader_threads()) == 1


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


def test_flips_belong_to_the_position(shards):
    positions = torch.arange(10_000)
    flips = draw_flips(positions, seed=3, probability=0.3)
    assert abs(flips.mean() - 0.3) < 0.03
    assert (draw_flips(positions[5000:], seed=3, probability=0.3) == flips[5000:]).all()
    assert (draw_flips(positions, seed=4, probability=0.3) != flips).any()
    assert not draw_flips(positions, seed=3, probability=0.0).any()
    assert draw_flips(positions, seed=3, probability=1.0).all()


def test_flipped_images_do_not_depend_on_the_ranks():
    pattern = "embedded:digits8/train-*.tar"
    with (
        loader(pattern, batch=64, size=8) as plain,
        loader(pattern, batch=64, size=8, flip=0.5) as one,
        loader(pattern, batch=64, size=8, flip=0.5, rank=1, ranks=2) as half,
    ):
        straight, flipped = next(plain).image, next(one).image
        assert torch.equal(next(half).image, flipped[32:])
    turned = (flipped == straight.flip(-1)).flatten(1).all(1)
    as_is = (flipped == straight).flatten(1).all(1)
    assert (turned | as_is).all()
    assert 16 < turned.sum() < 48


def test_prefetching_is_ahead_bounded_and_measured(shards):
    batches = loader(shards([50]), prefetch=3)
    loaded = []
    real = batches.share.load
    batches.share.load = lambda start: (loaded.append(start), real(start))[1]
    next(batches)
    assert batches.wait_seconds > 0
    deadline = time.monotonic() + 10
    while len(loaded) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    # One taken, three ready, one in hand.
    assert loaded == [0, 6, 12, 18, 24]
    next(batches)
    assert batches.queue_depth == 3
    assert batches.wait_seconds < 0.1
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


@pytest.mark.parametrize("limit", [None, 1, 7, 100])
def test_held_out_samples_come_in_file_order(shards, limit):
    pattern = [shards([4, 0, 5])]
    images, labels = read_all(pattern, decoder(), keep={}, classes=10, limit=limit, batch=3)
    count = min(9, limit or 9)
    assert images.shape == (count, 1, 4, 4)
    assert labels.tolist() == list(range(count))


def test_held_out_digits_are_not_trained_on():
    def pixels(split):
        pattern = [f"embedded:digits28/{split}-000000.tar"]
        images, _ = read_all(pattern, decoder(size=28), keep={}, classes=10, limit=500, batch=64)
        return images.flatten(1)

    assert torch.cdist(pixels("train"), pixels("heldout")).min() > 1
