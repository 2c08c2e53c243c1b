"""Remote ranges come in few requests, each asked for once, within bounds of bytes."""

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import reader as reader_module
from data_pipeline.reader import LARGEST_GAP, LARGEST_SPAN, Range, RangeReader, coalesce
from flows.errors import UserError
from tests.data_pipeline.conftest import reach

ranges = st.lists(
    st.builds(
        Range,
        st.sampled_from(["a", "b"]),
        st.integers(0, 4 * LARGEST_SPAN),
        st.integers(0, LARGEST_SPAN + LARGEST_GAP),
    ),
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(ranges)
def test_spans_hold_every_range_once_within_gap_and_size(parts):
    spans = coalesce(parts)
    assert sorted(part for span in spans for part in span.ranges) == sorted(parts)
    for span in spans:
        inside = sorted((part.offset, part.offset + part.size) for part in span.ranges)
        assert {part.url for part in span.ranges} == {span.url}
        assert (span.start, span.end) == (inside[0][0], max(end for _, end in inside))
        assert len(inside) == 1 or span.end - span.start <= LARGEST_SPAN or _contained(inside)
        reached = span.start
        for start, end in inside:
            assert start - reached <= LARGEST_GAP
            reached = max(reached, end)


def _contained(inside):
    """All lie in one of them, which alone is larger than a span may be."""
    first, last = max(inside, key=lambda part: part[1] - part[0])
    return all(first <= start and end <= last for start, end in inside)


@pytest.fixture
def remote(monkeypatch):
    """A shard in memory, and the requests for parts of it."""
    content = np.random.default_rng(0).bytes(200_000)
    fsspec.filesystem("memory").pipe_file("/reader/a", content)
    asked = []
    real = MemoryFileSystem.cat_file

    def cat_file(self, path, start=None, end=None, **options):
        asked.append((start, end))
        return real(self, path, start=start, end=end, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return content, asked


def part(offset, size=100):
    return Range("memory:///reader/a", offset, size)


def test_neighbours_share_a_request_and_keep_their_order(remote, monkeypatch):
    monkeypatch.setattr(reader_module, "LARGEST_GAP", 1000)
    content, asked = remote
    reader = RangeReader()
    parts = [part(100_000), part(900), part(0), part(900), part(101_000, 7)]
    assert reader.read(parts) == [content[p.offset : p.offset + p.size] for p in parts]
    assert sorted(asked) == [(0, 1000), (100_000, 101_007)]
    reader.close()


def test_what_was_expected_is_asked_for_once_and_not_past_the_bound(remote, monkeypatch):
    monkeypatch.setattr(reader_module, "LARGEST_GAP", 0)
    monkeypatch.setattr(reader_module, "AHEAD_BYTES", 250)
    content, asked = remote
    reader = RangeReader()
    parts = [part(1000 * n) for n in range(4)]
    reader.expect(parts)
    reader.expect(parts)
    assert reader.read(parts) == [content[p.offset : p.offset + p.size] for p in parts]
    assert sorted(asked) == [(1000 * n, 1000 * n + 100) for n in range(4)]
    # Room again: two of the four were held.
    reader.expect(parts)
    reader.forget()
    reader.expect(parts[2:])
    assert reader.read(parts[2:]) == [content[p.offset : p.offset + p.size] for p in parts[2:]]
    assert reader._ahead_bytes == 0
    reader.close()


def test_a_short_answer_is_asked_for_again(remote, monkeypatch):
    content, asked = remote
    whole = MemoryFileSystem.cat_file

    def cut_once(self, path, start=None, end=None, **options):
        answer = whole(self, path, start=start, end=end, **options)
        return answer[:10] if len(asked) == 1 else answer

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cut_once)
    reach(attempts=2)
    reader = RangeReader()
    assert reader.read([part(50)]) == [content[50:150]]
    assert len(asked) == 2
    reader.close()


def test_one_range_past_the_end_does_not_take_its_neighbours_along(remote):
    content, _ = remote
    reader = RangeReader()
    good, bad = part(199_900, 50), part(199_950, 100)
    first, second = reader.fetch([good, bad])
    assert first == content[199_900:199_950]
    assert isinstance(second, UserError)
    assert "ends before byte 200050" in str(second)
    reader.close()


def test_a_shard_that_was_given_up_is_asked_once_until_it_answers(remote, monkeypatch):
    content, asked = remote
    whole = MemoryFileSystem.cat_file
    broken = [True]

    def cat_file(self, path, start=None, end=None, **options):
        answer = whole(self, path, start=start, end=end, **options)
        if broken[0]:
            raise OSError("reset")
        return answer

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    monkeypatch.setattr("data_pipeline.storage.PAUSE_SECONDS", 0.0)
    reach(attempts=3)
    reader = RangeReader()
    for wanted in (3, 4, 5):
        assert isinstance(reader.fetch([part(0)])[0], UserError)
        assert len(asked) == wanted
    broken[0] = False
    assert reader.fetch([part(0)]) == [content[:100]]
    broken[0] = True
    reader.fetch([part(0)])
    assert len(asked) == 6 + 3
    reader.close()
