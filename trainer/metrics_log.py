"""`metrics.jsonl`: one line of JSON a step, the run's own record of what happened.

Finite floats are written with the shortest text that reads back bit for bit. JSON has no word for
the others: they are the strings "NaN", "Infinity" and "-Infinity", which `read` (and any `float()`)
turn back. A line counts once its newline is written; a process killed in the middle of a
line leaves a torn tail, which readers pass over and the next writer cuts off.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from flows.errors import UserError

Record = dict[str, Any]

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(record: Mapping[str, Any]) -> str:
    """One line of valid JSON, without its newline."""
    return json.dumps(_to_json(record), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def decode(line: str) -> Record:
    """The record that `encode` was given. Raises ValueError if the line is not a JSON object."""
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        return {key: _from_json(value) for key, value in record.items()}
    except RecursionError:
        raise ValueError("nested too deeply") from None


class MetricsLog:
    """Appends to `metrics.jsonl`; the operating system has each line before `append` returns."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending, after cutting off a torn tail."""
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_tail(path)
        self._file = path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one step; `record` holds at least an integer `step`. Raises OSError on a full disk."""
        line = f"{encode(record)}\n".encode()
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read(path: Path) -> list[Record]:
    """Every whole line of a log, in order; [] if there is no file.

    Raises UserError for a folder, or a line that is not JSON, unless it is the torn last one.
    """
    if not path.exists():
        return []
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a log; move it away to start a new log.")
    return [record for _, record in _lines(path)]


def truncate_after(path: Path, step: int) -> int:
    """Drop the lines of steps after `step`, as a resume from that step's checkpoint must; how many.

    The file is replaced in one rename, so that a crash leaves either the old lines or the new ones.
    """
    if not path.exists():
        return 0
    lines = list(_lines(path))
    kept = [line for line, record in lines if int(record["step"]) <= step]
    text = "".join(line + "\n" for line in kept)
    if text == path.read_text(encoding="utf-8"):
        return 0
    replace(path, text)
    return len(lines) - len(kept)


def replace(path: Path, text: str) -> None:
    """Write `text` to `path` so that a crash leaves the old file or the new one, no mixture."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _lines(path: Path) -> list[tuple[str, Record]]:
    """Whole lines with their records; a last line without its newline is torn and left out."""
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = whole.split("\n") if whole else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            record = decode(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            raise UserError(
                f"{path}, line {number} is not a step's record in JSON; "
                "remove that line, or move the file away to start a new log."
            ) from None
        found.append((line, record))
    return found


def cut_torn_tail(path: Path) -> None:
    """Cut the file after its last newline."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(inner) for inner in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _from_json(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_json(inner) for inner in value]
    return value
