"""A pattern names the same sorted shards on any storage, or one sentence says which is missing."""

import fsspec
import pytest

from data_pipeline import shards
from data_pipeline.shards import expand, short_names
from flows.errors import UserError


@pytest.mark.parametrize("prefix", ["", "file://", "memory://"])
def test_braces_and_globs_name_the_same_shards(tmp_path, prefix):
    folder = f"{prefix}{tmp_path}/set"
    for number in (2, 0, 1, 10):
        with fsspec.open(f"{folder}/a-{number:02d}.tar", "wb", auto_mkdir=True) as file:
            file.write(b"x")
    named = expand(folder + "/a-{00..02}.tar")
    assert [url.rsplit("/", 1)[1] for url in named] == ["a-00.tar", "a-01.tar", "a-02.tar"]
    assert expand(folder + "/a-0*.tar") == named
    assert expand(folder + "/{a-01,a-00,a-01,a-02}.tar") == named
    assert len(expand(folder + "/*.tar")) == 4


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("no-such/{00..03}.tar", r"no-such/\{00\.\.03\}\.tar.*no shard no-such/00\.tar"),
        ("no-such/*.tar", r"no-such/\*\.tar"),
        ("embedded:digits28/train-{000000..000009}.tar", "train-000004"),
        ("embedded:../order.py", "inside the package"),
        ("set/{00..03.tar", "braces"),
        ("set/{000000..999999999999}.tar", "more than 10,000,000 shards"),
        ("nothing3://bucket/a.tar", "nothing3://bucket/a.tar: no storage driver"),
    ],
)
def test_what_a_pattern_does_not_name_is_said(pattern, words):
    with pytest.raises(UserError, match=words):
        expand(pattern)


def test_too_many_names_are_refused_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(shards, "MOST_NAMES", 50)
    for pattern in ("no/{0..9}{0..9}", "no/{a,b}{0..29}", "no/{0..60}"):
        with pytest.raises(UserError, match="stand for more than 50 shards"):
            expand(pattern)
    with pytest.raises(UserError, match="no shard no/00"):
        expand("no/{0..4}{0..9}")


@pytest.mark.parametrize("prefix", ["", "memory://"])
def test_a_folder_is_no_shard_with_a_slash_or_without(tmp_path, prefix):
    folder = f"{prefix}{tmp_path}/digits"
    with fsspec.open(f"{folder}/a.tar", "wb", auto_mkdir=True) as file:
        file.write(b"x")
    for name in (folder, f"{folder}/"):
        with pytest.raises(UserError, match=r"digits is a folder; name .* in .*digits/\*\.tar"):
            expand(name)


def test_short_names_are_unique_and_free_of_the_place():
    assert short_names(("/x/set/a/0.tar", "/x/set/b/0.tar")) == ("a/0", "b/0")
    assert short_names(("s3://y/set/a/0.tar", "s3://y/set/b/0.tar")) == ("a/0", "b/0")
    assert short_names(("/x/0.tar",)) == ("0",)
