"""Batches of one shape: a pure function of position, in exact proportion, every sample in its turn."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.augment import centre_views
from data_pipeline.buckets import BucketedOrder, Buckets, assign, deal, make_buckets, read_sizes
from data_pipeline.decode.decoder import open_decoder
from data_pipeline.decode.images import read_pictures
from data_pipeline.faults import Tolerance, read_lines
from data_pipeline.loader import Loader
from data_pipeline.samples import Samples
from data_pipeline.share import Share
from data_pipeline.stream import open_stream
from flows.errors import UserError
from tests.data_pipeline.conftest import image_file, write_tar
from tests.data_pipeline.test_loader import CPU, PLAIN, decoder

counts = st.lists(st.integers(1, 10**9), min_size=1, max_size=8)


def naive_deal(batches, counts):
    """The same by its definition: times, sorted."""
    due = [
        (Fraction(2 * turn + 1, 2 * count), bucket, turn)
        for bucket, count in enumerate(counts)
        for turn in range(batches)
    ]
    return [(bucket, turn) for _, bucket, turn in sorted(due)[:batches]]


@settings(max_examples=500, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=6))
@example(counts=[1])
@example(counts=[5, 5, 5])
@example(counts=[1, 1000])
def test_batches_are_dealt_by_the_time_they_are_due(counts):
    assert [deal(number, counts) for number in range(30)] == naive_deal(30, counts)


@settings(max_examples=500, deadline=None)
@given(counts=counts, number=st.integers(0, 10**12))
def test_any_batch_is_near_its_share(counts, number):
    bucket, turn = deal(number, counts)
    share = Fraction(number * counts[bucket], sum(counts))
    bound = (1 + len(counts) * Fraction(counts[bucket], sum(counts))) / 2
    assert abs(turn - share) <= bound


def shards_of(data, buckets):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
    return [
        np.array(data.draw(st.lists(st.integers(0, buckets - 1), min_size=n, max_size=n)), np.uint8)
        for n in lengths
    ]


def check_turns(data, batch, lanes, window):
    shapes = [(8, 24), (16, 16), (24, 8)]
    assigned = shards_of(data, len(shapes))
    order = BucketedOrder(assigned, shapes, batch=batch, seed=7, lanes=lanes, window=window)
    epochs = 2
    batches = -(-epochs * order.samples // batch)
    seen: Counter[tuple[int, int]] = Counter()
    taken: Counter[tuple[int, int]] = Counter()
    for number in range(batches):
        found = order.sample_at(np.arange(number * batch, (number + 1) * batch))
        places = list(zip(found.shard.tolist(), found.sample.tolist(), strict=True))
        inside = {int(assigned[shard][sample]) for shard, sample in places}
        assert [shapes[bucket] for bucket in inside] == [order.size_at(number * batch)]
        seen.update(places)
        taken[order.size_at(number * batch)] += batch
    for shard, buckets in enumerate(assigned):
        for sample, bucket in enumerate(buckets.tolist()):
            members = sum(int((other == bucket).sum()) for other in assigned)
            passes = taken[shapes[bucket]] / members
            assert int(passes) <= seen[shard, sample] <= -(-taken[shapes[bucket]] // members)
            share = members / order.samples
            slack = (1 + len(order.buckets) * share) / 2
            assert abs(taken[shapes[bucket]] / batch - batches * share) <= slack + 1e-9


laid_out = given(
    data=st.data(), batch=st.integers(2, 9), lanes=st.integers(1, 5), window=st.integers(1, 6)
)


@settings(max_examples=100, deadline=None)
@laid_out
def test_batches_have_one_bucket_and_each_sample_comes_in_its_turn(data, batch, lanes, window):
    check_turns(data, batch, lanes, window)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@laid_out
def test_each_sample_comes_in_its_turn_at_length(data, batch, lanes, window):
    check_turns(data, batch, lanes, window)


def check_world_sizes(data, batch):
    shapes = [(8, 24), (16, 16), (24, 8)]
    assigned = shards_of(data, len(shapes))

    def fresh():
        return BucketedOrder(assigned, shapes, batch=batch, seed=3, lanes=3, window=4)

    whole = fresh().sample_at(np.arange(5 * batch))
    position = 0
    while position < 5 * batch:
        ranks = data.draw(st.sampled_from(sorted({1, min(2, batch), min(3, batch), batch})))
        steps = data.draw(st.integers(1, 4))
        order = fresh()
        for start in range(position, min(position + steps * batch, 5 * batch), batch):
            ends = [start + batch * rank // ranks for rank in range(ranks + 1)]
            for begin, end in pairwise(ends):
                part = order.sample_at(np.arange(begin, end))
                assert np.array_equal(part.shard, whole.shard[begin:end])
                assert np.array_equal(part.sample, whole.sample[begin:end])
                assert np.array_equal(part.epoch, whole.epoch[begin:end])
        position += steps * batch


@settings(max_examples=50, deadline=None)
@given(data=st.data(), batch=st.integers(1, 8))
def test_any_sequence_of_world_sizes_reads_the_same_batches(data, batch):
    check_world_sizes(data, batch)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(data=st.data(), batch=st.integers(1, 8))
def test_any_sequence_of_world_sizes_reads_the_same_batches_at_length(data, batch):
    check_world_sizes(data, batch)


@pytest.mark.parametrize(("side", "multiple"), [(256, 32), (512, 64), (96, 16), (64, 64)])
def test_buckets_have_about_one_area(side, multiple):
    buckets = make_buckets(side, multiple=multiple, widest=2.0)
    assert (side, side) in buckets
    aspects = [width / height for height, width in buckets]
    assert aspects == sorted(aspects)
    assert 0.5 <= aspects[0] <= aspects[-1] <= 2
    for height, width in buckets:
        assert height % multiple == width % multiple == 0
        assert (width, height) in buckets
        assert abs(height * width - side * side) <= multiple * max(height, width) / 2


def test_images_go_to_the_nearest_aspect():
    buckets = ((32, 16), (24, 24), (16, 32))
    sizes = np.array([[4000, 2000], [300, 300], [10, 1000], [100, 141], [100, 142], [141, 100]])
    assert assign(sizes, buckets).tolist() == [0, 1, 2, 1, 2, 1]


def test_sizes_are_read_from_headers(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    shapes = [(20, 50), (50, 20), (30, 31)]
    files = [image_file(np.zeros(shape, np.uint8), "JPEG") for shape in shapes]
    files.append(image_file(np.zeros((8, 24), np.uint8), "JPEG", exif=turned))
    members = [m for n, file in enumerate(files) for m in ((f"{n}.jpg", file), (f"{n}.cls", b"1"))]
    write_tar(tmp_path / "a.tar", members[:2])
    write_tar(tmp_path / "b.tar", members[2:])
    contents = Samples(f"{tmp_path}/*.tar", classes=None)
    assert read_sizes(contents, 0).tolist() == [[20, 50]]
    assert read_sizes(contents, 1).tolist() == [[50, 20], [30, 31], [24, 8]]
    contents.close()


def test_a_batch_is_decoded_at_the_shape_of_its_bucket():
    pixels = [np.full(shape, 9, np.uint8) for shape in ((20, 50), (50, 20), (30, 30), (18, 44))]
    pictures = read_pictures([image_file(p) for p in pixels], [""] * 4)
    buckets = make_buckets(16, multiple=4, widest=3.0)
    chosen = assign(np.array([picture.size for picture in pictures]), buckets)
    order = BucketedOrder([chosen], buckets, batch=2, seed=0, lanes=1, window=1)
    decoder = open_decoder("auto", channels=1, threads=1, device=torch.device("cpu"))
    for start in range(0, 8, 2):
        places = order.sample_at(np.arange(start, start + 2)).sample.tolist()
        size = order.size_at(start)
        batch = [pictures[place] for place in places]
        image = decoder.decode(batch, centre_views([p.size for p in batch], size))
        assert image.shape == (2, 1, *size)
        assert {buckets[chosen[place]] for place in places} == {size}
    decoder.close()


SHAPES = make_buckets(16, multiple=4, widest=3.0)
OF_IMAGES = [(20, 50), (50, 20), (30, 30), (18, 44), (31, 33)]


def write_set(folder, spoiled=()):
    """Shards of 23 images of several shapes, each painted with its number."""
    folder.mkdir()
    number = 0
    for shard, size in enumerate((9, 3, 11)):
        members = []
        for _ in range(size):
            image = image_file(np.full(OF_IMAGES[number % 5], number * 7, np.uint8))
            content = b"spoiled" if number in spoiled else image
            members += [(f"{number:02d}.png", content), (f"{number:02d}.cls", b"1")]
            number += 1
        write_tar(folder / f"{shard}.tar", members)
    return f"{folder}/*.tar"


def loader_of(pattern, *, batch=4, rank=0, ranks=1, keep=None, tolerate=None):
    stream = open_stream(
        [(pattern, 1.0)], keep=keep or {}, classes=10, seed=5, lanes=2, window=3, tolerate=tolerate,
        buckets=Buckets(SHAPES, batch),
    )  # fmt: skip
    share = Share(
        stream, decoder(), size=(99, 99), augment=PLAIN, seed=5, batch=batch, rank=rank, ranks=ranks,
        device=CPU,
    )  # fmt: skip
    return Loader(share, prefetch=2)


def painted(image):
    return [round((float(one.mean()) + 1) * 127.5) // 7 for one in image]


def shape_of(number):
    (bucket,) = assign(np.array([OF_IMAGES[number % 5]]), SHAPES)
    return SHAPES[bucket]


def test_a_loader_gives_batches_of_the_shape_of_their_images_on_any_ranks(tmp_path):
    pattern = write_set(tmp_path / "set")
    with loader_of(pattern) as batches:
        whole = [next(batches) for _ in range(12)]
    assert len({batch.image.shape for batch in whole}) == 3
    for batch in whole:
        assert {shape_of(number) for number in painted(batch.image)} == {batch.image.shape[2:]}
    every = [loader_of(pattern, rank=rank, ranks=3) for rank in range(3)]
    for want in whole[:5]:
        assert torch.equal(torch.cat([next(one).image for one in every]), want.image)
    state = every[1].state_dict()
    for one in every:
        one.close()
    with loader_of(pattern, rank=1, ranks=2) as resumed:
        resumed.load_state_dict(state)
        for want in whole[5:]:
            assert torch.equal(next(resumed).image, want.image[2:])
    with loader_of(pattern, batch=6) as other, pytest.raises(UserError, match="another stream"):
        other.load_state_dict(state)


def test_a_bad_image_is_replaced_by_one_of_its_batchs_shape(tmp_path):
    pattern = write_set(tmp_path / "set", spoiled=(2, 7))
    with pytest.raises(UserError, match=r"sample 02: .*not a PNG"):
        loader_of(pattern)
    report = tmp_path / "report"
    runs = []
    for ranks in (1, 2):
        every = [
            loader_of(pattern, rank=rank, ranks=ranks, tolerate=Tolerance(0.5, report, None))
            for rank in range(ranks)
        ]
        runs.append([torch.cat([next(one).image for one in every]) for _ in range(12)])
        for one in every:
            one.close()
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    for image in runs[0]:
        numbers = painted(image)
        assert not {2, 7} & set(numbers)
        # Nobody can know the shape of an image that cannot be read; it counts as square.
        assert {shape_of(number) for number in numbers} == {image.shape[2:]}
    assert {line["key"] for line in read_lines(report)} == {"02", "07"}


def test_sizes_are_read_once_and_filters_and_mixtures_are_minded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pattern = write_set(tmp_path / "set")
    read = []
    real = Samples.fetch
    monkeypatch.setattr(Samples, "fetch", lambda *a: (read.append(len(a[1])), real(*a))[1])
    loader_of(pattern).close()
    assert sum(read) == 23
    with loader_of(pattern, keep={"cls": [1]}) as again:
        assert sum(read) == 23
        assert again.stream.samples == 23
    with pytest.raises(UserError, match="mixture of data sets has no buckets"):
        open_stream(
            [(pattern, 1.0), (pattern, 2.0)], keep={}, classes=10, seed=5, lanes=2, window=3,
            buckets=Buckets(SHAPES, 4),
        )  # fmt: skip
