"""A bad sample shifts nothing: the same other one takes its place on any ranks, is reported once, and
counts against the epoch's budget."""

import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.decode.decoder import open_decoder
from data_pipeline.faults import (
    MOST_SUBSTITUTES,
    Budget,
    PastShard,
    Quarantine,
    Tolerance,
    read_lines,
    read_past,
    write_past,
)
from data_pipeline.file_order import read_all
from data_pipeline.loader import Loader
from data_pipeline.samples import Samples
from data_pipeline.share import Share
from data_pipeline.storage import resolve
from data_pipeline.stream import open_stream
from flows.errors import UserError
from tests.data_pipeline.conftest import grey, sample, write_tar
from tests.data_pipeline.test_loader import PLAIN

CPU = torch.device("cpu")
# Samples of the 30 written by `spoiled`, and what is wrong with them.
SPOILED = {
    3: [("0003.png", b""), ("0003.cls", b"3")],
    9: [("0009.png", grey(9)[:50]), ("0009.cls", b"9")],
    14: [("0014.png", grey(14)), ("0014.cls", b"cat")],
    22: [("0022.png", grey(22))],
}


def spoiled(folder: Path) -> str:
    folder.mkdir()
    for shard in range(3):
        members = []
        for number in range(10 * shard, 10 * shard + 10):
            members += SPOILED.get(number) or sample(f"{number:04d}", number, number % 10)
        write_tar(folder / f"train-{shard}.tar", members)
    return f"{folder}/train-*.tar"


def loader(pattern, tolerate, *, rank=0, ranks=1, kind="pillow", batch=6, prefetch=2):
    stream = open_stream(
        [(pattern, 1.0)], keep={}, classes=10, seed=4, lanes=3, window=4, tolerate=tolerate
    )
    share = Share(
        stream,
        open_decoder(kind, channels=1, threads=1, device=CPU),
        size=(4, 4),
        augment=PLAIN,
        seed=4,
        batch=batch,
        rank=rank,
        ranks=ranks,
        device=CPU,
    )
    return Loader(share, prefetch=prefetch)


def numbers(batch):
    return torch.round((batch.image.mean((1, 2, 3)) + 1) * 127.5).long().tolist()


def run(pattern, report, *, ranks, batches, kind="pillow"):
    """The numbers of all samples in order, and how many were replaced."""
    tolerate = Tolerance(0.5, report, None)
    every = [loader(pattern, tolerate, rank=rank, ranks=ranks, kind=kind) for rank in range(ranks)]
    got, bad = [], 0
    for _ in range(batches):
        for one in every:
            batch = next(one)
            assert batch.label.tolist() == [n % 10 for n in numbers(batch)]
            got += numbers(batch)
            bad += one.bad_samples
    for one in every:
        one.close()
    return got, bad


@pytest.mark.parametrize("kind", ["pillow", "dali"])
def test_the_same_samples_take_their_place_on_any_ranks(tmp_path, kind):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    pattern = spoiled(tmp_path / "set")
    runs = {n: run(pattern, tmp_path / str(n), ranks=n, batches=10, kind=kind) for n in (1, 2, 3)}
    assert runs[1] == runs[2] == runs[3]
    order = [int(key[-4:]) for key in _keys(pattern, 60)]
    got, bad = runs[1]
    assert bad == 2 * len(SPOILED)
    for position, (wanted, taken) in enumerate(zip(order, got, strict=True)):
        assert (taken == wanted) == (wanted not in SPOILED), position
        assert taken not in SPOILED
    reports = [sorted(read_lines(tmp_path / str(n)), key=lambda r: r["position"]) for n in runs]
    assert reports[0] == reports[1] == reports[2]
    assert [line["position"] for line in reports[0]] == [
        position for position, number in enumerate(order) if number in SPOILED
    ]
    for line in reports[0]:
        assert int(line["key"]) == order[line["position"]]
        assert line["url"].startswith(f"{tmp_path}/set/train-")
        assert line["reason"].startswith(f"{line['url']}: sample {line['key']}")
        assert int(line["replaced_by"][-4:]) == got[line["position"]]


def _keys(pattern, count):
    tolerate = Tolerance(0.5, None, None)
    stream = open_stream(
        [(pattern, 1.0)], keep={}, classes=10, seed=4, lanes=3, window=4, tolerate=tolerate
    )
    return stream.keys(torch.arange(count))


def test_what_takes_a_place_is_of_the_same_epoch_and_spread_evenly(shards):
    stream = open_stream([(shards([50, 50]), 1.0)], keep={}, classes=10, seed=1, lanes=4, window=8)
    positions = torch.full((4000,), 217)
    attempts = torch.arange(1, 4001)
    keys = [one.key for one in stream.fetch(positions, attempts)]
    counts = np.bincount([int(key) for key in keys], minlength=100)
    assert counts.min() > 10
    assert counts.max() < 90
    again = [one.key for one in stream.fetch(positions[:9], attempts[:9])]
    assert again == keys[:9]
    other = open_stream(
        [(shards([50, 50], "b"), 1.0)], keep={}, classes=10, seed=2, lanes=4, window=8
    )
    assert [one.key for one in other.fetch(positions, attempts)] != keys


def test_a_resume_replaces_alike_and_reports_nothing_twice(tmp_path):
    pattern = spoiled(tmp_path / "set")
    whole, _ = run(pattern, tmp_path / "whole", ranks=1, batches=10)
    tolerate = Tolerance(0.5, tmp_path / "parts", None)
    with loader(pattern, tolerate) as first:
        got = [n for _ in range(7) for n in numbers(next(first))]
        state = first.state_dict()
        # Taken, and lost in a crash before the next checkpoint.
        lost = [n for _ in range(2) for n in numbers(next(first))]
    with loader(pattern, tolerate) as second:
        second.load_state_dict(state)
        got += [n for _ in range(3) for n in numbers(next(second))]
    assert got == whole
    assert lost == whole[42:54]
    assert read_lines(tmp_path / "parts") == read_lines(tmp_path / "whole")


def test_only_batches_that_were_taken_are_reported(tmp_path):
    pattern = spoiled(tmp_path / "set")
    with loader(pattern, Tolerance(0.5, tmp_path / "report", None), prefetch=9) as batches:
        next(batches)
        taken = batches.position
    order = [int(key[-4:]) for key in _keys(pattern, taken)]
    assert len(read_lines(tmp_path / "report")) == sum(number in SPOILED for number in order)


def test_nothing_is_tolerated_unless_asked(tmp_path):
    pattern = spoiled(tmp_path / "set")
    for tolerate in (None, Tolerance(0.0, tmp_path / "report", None)):
        with pytest.raises(UserError, match="sample 0022 has no label"):
            loader(pattern, tolerate)
    assert not (tmp_path / "report").exists()


def test_more_bad_samples_than_an_epoch_may_have_stop_the_loader(tmp_path):
    pattern = spoiled(tmp_path / "set")
    with loader(pattern, Tolerance(0.1, tmp_path / "report", None)) as batches:
        with pytest.raises(UserError) as caught:
            list(itertools.islice(batches, 5))
        position = batches.position
        assert position < 30
        with pytest.raises(UserError, match="4 bad samples in this epoch of 30"):
            next(batches)
    said = str(caught.value)
    assert "data.max_bad_fraction = 0.1 allows 3" in said
    assert "quarantine.jsonl" in said
    assert "\n" not in said
    with loader(pattern, Tolerance(0.14, None, None)) as batches:
        for _ in range(20):
            next(batches)


def test_the_budget_is_an_epochs_and_survives_a_resume():
    budget = Budget(0.1, 20)
    budget.add(0, 2)
    later = Budget(0.1, 20)
    later.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    later.add(10, 0)
    later.add(20, 2)
    assert later.total == 4
    with pytest.raises(UserError, match="3 bad samples in this epoch of 20"):
        later.add(25, 1)
    with pytest.raises(UserError, match="3 bad samples in this epoch of 20"):
        budget.add(19, 1)


def test_where_all_is_bad_it_ends(tmp_path):
    members = [(f"{n:04d}.{e}", b"x") for n in range(9) for e in ("png", "cls")]
    pattern = write_tar(tmp_path / "a.tar", members)
    words = rf"is not an integer.*; neither could any of {MOST_SUBSTITUTES} others be used"
    with (
        loader(pattern, Tolerance(1.0, None, None)) as batches,
        pytest.raises(UserError, match=words),
    ):
        next(batches)


def test_a_shard_that_cannot_be_indexed_is_left_out_and_the_fingerprint_says_so(shards, tmp_path):
    pattern = shards([4] * 5)
    whole = open_stream([(pattern, 1.0)], keep={}, classes=10, seed=0, lanes=2, window=2)
    broken = tmp_path / "data" / "train-02.tar"
    content = broken.read_bytes()
    broken.write_bytes(content[:2000])
    tolerate = Tolerance(0.2, None, None)
    part = open_stream(
        [(pattern, 1.0)], keep={}, classes=10, seed=0, lanes=2, window=2, tolerate=tolerate
    )
    assert part.samples == 16
    assert part.fingerprint != whole.fingerprint
    assert {key.split("/")[0] for key in part.keys(torch.arange(16))} == {
        f"train-0{n}" for n in (0, 1, 3, 4)
    }
    (left_out,) = [shard for shard in part.past if shard.left_out]
    assert "train-02.tar: not a whole uncompressed tar" in left_out.left_out
    with pytest.raises(
        UserError, match=r"1 of 5 shards cannot be used.*= 0\.1 allows 0; the first"
    ):
        Samples(pattern, classes=10, tolerate=Tolerance(0.1, None, None))


def test_a_resume_has_the_shards_the_run_began_with(shards, tmp_path):
    pattern = shards([4] * 5)
    broken = tmp_path / "data" / "train-02.tar"
    content = broken.read_bytes()
    broken.write_bytes(content[:2000])

    def begin(past, fraction=0.4):
        tolerate = Tolerance(fraction, None, past)
        return open_stream(
            [(pattern, 1.0)], keep={}, classes=10, seed=0, lanes=2, window=2, tolerate=tolerate
        )

    first = begin(None)
    write_past(tmp_path / "shards.jsonl", first.past)
    past = read_past(tmp_path / "shards.jsonl")
    # The shard is repaired and another one vanishes: neither moves any position.
    broken.write_bytes(content)
    (tmp_path / "data" / "train-04.tar").unlink()
    again = begin(past)
    assert again.fingerprint == first.fingerprint
    keys = first.keys(torch.arange(16))
    found = again.fetch(torch.arange(16), torch.zeros(16, dtype=torch.int64))
    for key, one in zip(keys, found, strict=True):
        if key.startswith("train-04/"):
            assert isinstance(one, UserError)
            assert "the shard cannot be found" in str(one)
        else:
            assert one.key == key.split("/")[1]
    with pytest.raises(UserError, match=r"train-02\.tar: was left out when this run began"):
        begin(past, fraction=0.0)
    whole = [shard._replace(left_out=None, samples=4) for shard in past]
    with pytest.raises(
        UserError, match=r"train-04\.tar: there is no shard .* any more; put it back"
    ):
        begin(whole, fraction=0.0)


@pytest.mark.parametrize("fraction", [0.0, 0.9])
def test_a_resume_refuses_a_pattern_that_names_less(shards, tmp_path, fraction):
    shards([4] * 3)
    first = Samples(f"{tmp_path}/data/*.tar", classes=10)
    tolerate = Tolerance(fraction, None, first.past)
    with pytest.raises(
        UserError, match=r"train-02\.tar: .* data\.train no longer names it; restore"
    ):
        Samples(f"{tmp_path}/data/train-0[01].tar", classes=10, tolerate=tolerate)


def test_a_run_goes_on_where_its_data_were_moved(shards, tmp_path, monkeypatch):
    shards([4, 5])
    monkeypatch.chdir(tmp_path)
    first = Samples("data/*.tar", classes=10)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    second = Samples("elsewhere/*.tar", classes=10, tolerate=Tolerance(0.0, None, first.past))
    assert (second.names, second.sizes) == (first.names, first.sizes)


def test_a_shard_that_vanishes_while_it_is_read_costs_its_samples_alone(shards, tmp_path):
    shards([6] * 5)
    for path in sorted((tmp_path / "data").iterdir()):
        resolve("memory://v").storage.pipe_file(f"/vanishing/{path.name}", path.read_bytes())
    url = "memory://vanishing/train-*.tar"
    with (
        loader(url, Tolerance(0.2, tmp_path / "report", None)) as batches,
        loader(url, None) as whole,
    ):
        want = [n for _ in range(5) for n in numbers(next(whole))]
        resolve("memory://v").storage.rm("/vanishing/train-03.tar")
        got = [n for _ in range(5) for n in numbers(next(batches))]
    gone = range(18, 24)
    assert [a == b for a, b in zip(want, got, strict=True)] == [n not in gone for n in want]
    lines = read_lines(tmp_path / "report")
    assert len(lines) == 6
    assert all("train-03.tar: the shard can no longer be read" in line["reason"] for line in lines)


@pytest.mark.parametrize("sharing", [1, 2])
def test_ranks_append_whole_lines_to_one_report(tmp_path, sharing):
    """sharing: ranks that have the same samples, of which one alone is to speak."""

    class Line:
        def __init__(self, position):
            self.position = position
            self.sample = type("S", (), {"url": "u" * 3000, "key": "k", "__str__": lambda _: "r"})()
            self.replaced_by = type("F", (), {"name": "other"})()

    reports = [Quarantine(tmp_path / "q.jsonl") for _ in range(8)]

    def write(rank):
        for step in range(25):
            reports[rank].add_samples([Line(8 * step + rank // sharing * sharing)])

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(line["position"] for line in read_lines(tmp_path / "q.jsonl")) == list(
        range(0, 200, sharing)
    )


def test_a_torn_last_line_of_the_report_is_no_obstacle(tmp_path):
    report = tmp_path / "q.jsonl"
    report.write_text('{"position": 3, "url": "a"}\n{"position": 4, "u')
    assert [line["position"] for line in read_lines(report)] == [3]
    Quarantine(report).add_shards([PastShard("b", "b.tar", 0, "truncated")])
    assert [line["url"] for line in read_lines(report)] == ["a", "b.tar"]
    report.write_text('{"position": 3}\n')
    with pytest.raises(UserError, match=r"q\.jsonl, line 1 is not a record"):
        read_lines(report)


def test_evaluation_takes_the_next_good_sample(tmp_path):
    pattern = spoiled(tmp_path / "set")
    decoder = open_decoder("pillow", channels=1, threads=1, device=CPU)
    options = {"size": (4, 4), "keep": {}, "classes": 10, "limit": 25, "batch": 4}
    with pytest.raises(UserError):
        read_all([pattern], decoder, **options)
    images, labels = read_all([pattern], decoder, **options, tolerate=Tolerance(0.2, None, None))
    got = torch.round((images.mean((1, 2, 3)) + 1) * 127.5).long().tolist()
    assert got == [n + (n in SPOILED) for n in range(25)]
    assert labels.tolist() == [n % 10 for n in got]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
