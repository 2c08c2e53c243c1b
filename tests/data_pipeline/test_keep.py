"""Filters: the stream is that of the kept samples alone, decided before the first is drawn."""

import json

import pytest
import torch

from data_pipeline.file_order import read_all
from data_pipeline.keep import kept_rows
from flows.errors import UserError
from tests.data_pipeline.conftest import grey, write_tar
from tests.data_pipeline.test_loader import decoder, loader, numbers, stream_of


@pytest.fixture
def described(tmp_path):
    """Four shards of 10 samples: label n % 5, `.json` with a language and whether n is safe."""
    languages = ("en", "de", "fr")
    for shard in range(4):
        members = []
        for n in range(shard * 10, shard * 10 + 10):
            record = {"language": languages[n % 3], "safe": n % 4 != 0, "width": n % 2}
            if n % 7 == 0:
                del record["language"]
            members += [
                (f"{n:04d}.png", grey(n)),
                (f"{n:04d}.cls", str(n % 5).encode()),
                (f"{n:04d}.json", json.dumps(record).encode()),
            ]
        write_tar(tmp_path / f"train-{shard}.tar", members)
    return f"{tmp_path}/train-*.tar"


@pytest.mark.parametrize(
    ("keep", "fits"),
    [
        ({"cls": [1, 3]}, lambda n: n % 5 in (1, 3)),
        ({"language": ["de"]}, lambda n: n % 3 == 1 and n % 7),
        ({"language": ["de", None]}, lambda n: n % 3 == 1 or n % 7 == 0),
        ({"safe": [True]}, lambda n: n % 4),
        ({"width": [True]}, None),
        ({"width": [1], "cls": [2, 4]}, lambda n: n % 2 and n % 5 in (2, 4)),
        ({"cls": [0], "safe": [False]}, lambda n: n % 20 == 0),
    ],
)
def test_every_kept_sample_comes_once_an_epoch_and_no_other(described, keep, fits):
    if fits is None:
        with pytest.raises(UserError, match=r'data\.keep = {"width": \[true\]} keeps none'):
            stream_of(described, keep=keep)
        return
    want = [n for n in range(40) if fits(n)]
    stream = stream_of(described, keep=keep)
    assert stream.samples == len(want)
    for epoch in (0, 5):
        positions = torch.arange(epoch * len(want), (epoch + 1) * len(want))
        keys = stream.keys(positions)
        assert sorted(int(key[-4:]) for key in keys) == want
        assert stream.read(positions).labels.tolist() == [int(key[-4:]) % 5 for key in keys]


def test_a_filter_holds_on_any_ranks_and_names_its_stream(described):
    keep = {"cls": [0, 1, 2], "language": ["en", "fr"]}
    with loader(described, keep=keep) as whole:
        want = [n for _ in range(6) for n in numbers(next(whole))]
        state = whole.state_dict()
    got = []
    for rank in range(3):
        with loader(described, keep=keep, rank=rank, ranks=3) as third:
            got.append([numbers(next(third)) for _ in range(6)])
    assert [n for shares in zip(*got, strict=True) for share in shares for n in share] == want
    for other in ({}, {"cls": [0, 1, 2]}, keep | {"safe": [True, False]}):
        with pytest.raises(UserError, match=r"restore data\.train, data\.keep"):
            loader(described, keep=other).load_state_dict(state)
    loader(described, keep={"language": ["en", "fr"], "cls": [0, 1, 2]}).load_state_dict(state)


def test_what_is_kept_is_remembered_until_the_shard_changes(tmp_path, monkeypatch):
    def label(n, value):
        return [(f"{n}.png", grey(n)), (f"{n}.cls", str(value).encode())]

    url = write_tar(tmp_path / "a.tar", [m for n in range(5) for m in label(n, n % 2)])
    assert kept_rows(url, keep={"cls": [1]}).tolist() == [1, 3]
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.keep._look_up", lambda *_: 1 / 0)
        assert kept_rows(url, keep={"cls": [1]}).tolist() == [1, 3]
        with pytest.raises(ZeroDivisionError):
            kept_rows(url, keep={"cls": [0]})
    write_tar(tmp_path / "a.tar", [m for n in range(9) for m in label(n, 1)])
    assert kept_rows(url, keep={"cls": [1]}).tolist() == list(range(9))


def test_evaluation_sees_what_training_keeps(described):
    _, labels = read_all(
        [described] * 2,
        decoder(),
        size=(4, 4),
        keep={"cls": [1, 3]},
        classes=5,
        limit=None,
        batch=7,
    )
    assert labels.tolist() == [1, 3] * 16


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, r"sample 7\\x1b has no \.json, which data\.keep looks into"),
        (b"{", r"sample 7\\x1b: its \.json is broken"),
        (b"[1]", r"sample 7\\x1b: its \.json holds no object"),
    ],
)
def test_a_record_that_cannot_be_looked_into_is_named(tmp_path, record, message):
    members = []
    for n in range(9):
        key = "7\x1b" if n == 7 else str(n)  # would drive a terminal
        members += [(f"{key}.png", grey(n)), (f"{key}.cls", b"0")]
        text = record if n == 7 else b'{"x": 1}'
        if text is not None:
            members.append((f"{key}.json", text))
    url = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=rf"bad\.tar: {message}"):
        stream_of(url, keep={"x": [1]})
