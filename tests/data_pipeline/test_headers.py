"""Headers that tarfile itself stumbles over."""

import tarfile

import pytest

from data_pipeline.headers import printable, read_members
from flows.errors import UserError
from tests.data_pipeline.conftest import write_tar


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"GNU.sparse.map": "a,b"},
        {"GNU.sparse.size": "x"},
        {"size": "9" * 30},
    ],
)
def test_damaged_numbers_in_extended_headers_are_a_damaged_tar(tmp_path, headers):
    member = tarfile.TarInfo("0.png")
    member.pax_headers = headers
    url = write_tar(tmp_path / "a.tar", [(member, b"x"), ("1.png", b"y")])
    with pytest.raises(
        UserError, match=r"a\.tar: a header of the tar is damaged \(.*; copy or pack"
    ):
        list(read_members(url))


def test_a_name_is_shown_without_what_a_terminal_would_obey():
    assert printable("a\x1b[31mb\n\x9b\udcff") == r"a\x1b[31mb\n\x9b\udcff"
    assert printable("Straße 猫/0001") == "Straße 猫/0001"
