"""Arrays in NumPy's files, read by any number of threads.

NumPy's own reader hands the header to Python's parser, and in CPython 3.11 two threads that parse at once
can fail with a SystemError (python/cpython issue 106905: the depth is counted for all threads
together). Headers of plain arrays need no parser.
"""

import io
import re
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Magic word, version 1.0, length of the header.
START = re.compile(rb"\x93NUMPY\x01\x00(..)", re.DOTALL)
# As `numpy.lib.format` writes it, for numbers, truth values, bytes and text.
HEADER = re.compile(
    r"\{'descr': '([<|=][biufSU][0-9]+)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n"
)

# What Python's zipfile raises for damaged files, by place of the damage.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    RuntimeError,
    IndexError,
    KeyError,
    OverflowError,
    UnicodeDecodeError,
)


def read_npy(content: bytes) -> NDArray[Any]:
    """The array of a `.npy` file, not copied and not to be written to.

    Raises ValueError for a damaged file, one of another version, and one that is not plain numbers.
    """
    start = START.match(content)
    if start is None:
        raise ValueError("it is no array of format 1.0")
    end = start.end() + int.from_bytes(start[1], "little")
    header = HEADER.fullmatch(content[start.end() : end].decode("latin-1"))
    if header is None:
        raise ValueError("its header is damaged, or not that of plain numbers")
    try:
        dtype = np.dtype(header[1])
    except TypeError as error:
        raise ValueError(f"its header is damaged: {error}") from error
    shape = tuple(int(side) for side in header[3].replace(",", " ").split())
    if dtype.itemsize == 0:
        return np.empty(shape, dtype)
    values = np.frombuffer(content, dtype, offset=end)
    return values.reshape(shape, order="F" if header[2] == "True" else "C")


def read_npz(content: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of an `.npz` file. Raises ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            return {
                name.removesuffix(".npy"): read_npy(file.read(name)) for name in file.namelist()
            }
    except DAMAGE as error:
        raise ValueError(f"it is damaged: {error}") from error
