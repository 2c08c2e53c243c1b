"""Arrays come back as NumPy wrote them, from any number of threads; nothing else is taken for one."""

import contextlib
import io
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data_pipeline.npy import read_npy, read_npz

plain = st.one_of(
    arrays.integer_dtypes(endianness="<"),
    arrays.unsigned_integer_dtypes(endianness="<"),
    arrays.floating_dtypes(endianness="<"),
    arrays.boolean_dtypes(),
    arrays.unicode_string_dtypes(endianness="<", max_len=9),
    arrays.byte_string_dtypes(max_len=9),
)
any_array = plain.flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0))
)


def written(values):
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


@settings(max_examples=200, deadline=None)
@given(any_array)
def test_arrays_come_back(values):
    got = read_npy(written(values))
    assert got.dtype == values.dtype
    assert np.array_equal(got, values, equal_nan=values.dtype.kind == "f")
    assert np.array_equal(read_npy(written(values.T)), values.T, equal_nan=values.dtype.kind == "f")


def packed():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.arange(7), b=np.array(["x", "yz"]), c=np.array("word"))
    return buffer.getvalue()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(1, 255))
def test_nothing_but_a_value_error_comes_of_damage(noise, place, flip):
    for whole, read in ((written(np.arange(6.0).reshape(2, 3)), read_npy), (packed(), read_npz)):
        damaged = bytearray(whole)
        damaged[place % len(whole)] ^= flip
        for content in (noise, whole[: place % len(whole)], bytes(damaged), whole[:10] + noise):
            with contextlib.suppress(ValueError):
                read(content)


@pytest.mark.parametrize(
    "values",
    [
        np.array([{"a": 1}], object),
        np.zeros(2, [("a", "<i4")]),
        np.zeros(2, ">f4"),
        np.zeros(2, "M8[s]"),
    ],
)
def test_what_is_no_plain_array_is_refused(values):
    with pytest.raises(ValueError, match="not that of plain numbers"):
        read_npy(written(values))


def test_many_threads_read_at_once():
    content, failed = packed(), []

    def read():
        for _ in range(200):
            got = read_npz(content)
            if got["a"].tolist() != list(range(7)) or str(got["c"]) != "word":
                failed.append(got)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
