"""The log gives back what was written, bit for bit, and survives being cut anywhere."""

import json
import math
import resource
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.errors import UserError
from trainer.metrics_log import MetricsLog, decode, encode, read, truncate_after


@given(st.floats(width=64))
def test_floats_come_back_bit_for_bit(value: float) -> None:
    line = encode({"step": 1, "loss": value})
    json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    back = decode(line)["loss"]
    if math.isnan(value):
        assert math.isnan(back)
    else:
        assert struct.pack("d", back) == struct.pack("d", value)


def _write(path: Path, steps: range) -> None:
    with MetricsLog(path) as log:
        for step in steps:
            log.append(
                {"step": step, "loss": 1 / step, "seconds": {"forward": 0.1, "bad": math.inf}}
            )


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: the kernel takes a part of a line, then none."""
    path = tmp_path / "metrics.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(path) as log:
        log.append({"step": 1, "loss": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                log.append({"step": 2, "loss": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [line["step"] for line in read(path)] == [1]
    _write(path, range(2, 3))
    assert [line["step"] for line in read(path)] == [1, 2]


def test_a_log_cut_at_any_byte_keeps_its_whole_lines_and_takes_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 4))
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        assert [r["step"] for r in read(path)] == list(range(1, whole + 1))
        with MetricsLog(path) as log:
            log.append({"step": 99})
        assert [r["step"] for r in read(path)] == [*range(1, whole + 1), 99]


def test_a_line_is_readable_before_the_log_is_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append({"step": 1, "loss": 0.1})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.1}]
    log.close()


def test_resume_drops_steps_after_the_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, range(1, 11))
    before = path.read_text().splitlines()
    with path.open("a") as file:
        file.write('{"step": 11, "lo')
    assert truncate_after(path, 7) == 3
    assert path.read_text().splitlines() == before[:7]
    assert truncate_after(path, 7) == 0
    _write(path, range(8, 11))
    assert path.read_text().splitlines() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == []
    assert truncate_after(tmp_path / "none.jsonl", 3) == 0


DEEP = 100_000 * "["


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '{"loss": 1}',
        DEEP,
        f'{{"step": 2, "load": {DEEP[:2000]}{2000 * "]"}}}',  # the reader's own recursion
    ],
)
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n' + line + '\n{"step":2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 "):
        read(path)
