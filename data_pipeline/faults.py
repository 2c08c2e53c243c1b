"""Bad samples: how many are tolerated, what takes their place, and where they are reported.

A sample that cannot be read or decoded, after every retry, is replaced by another of the same epoch: a
pure function of seed, position and attempt, so every layout draws the same one and no position shifts.
Its address and the reason go to `quarantine.jsonl` in the run folder, one line a position. A shard that
cannot be indexed is left out of the order as a whole when a run begins; what the run began with is kept in
`shards.jsonl`, and a resume has the same shards, whatever has become of them.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from data_pipeline.decode.images import BadImages
from data_pipeline.headers import sample_name
from data_pipeline.texts import Words
from flows.errors import UserError

T = TypeVar("T")

# Where a hundredth of the data is bad, the chance to meet so many bad ones in a row is 10^-64.
MOST_SUBSTITUTES = 32


class BadSample(UserError):
    """A sample that cannot be used.

    url: of its shard; key: its own, None where not even that can be read
    """

    def __init__(self, sentence: str, *, url: str, key: str | None) -> None:
        super().__init__(sentence)
        self.url = url
        self.key = key


@dataclass(frozen=True)
class Found:
    """A sample as it lies in its shard.

    url, key: of its shard, and its own
    image: the bytes of its image file
    label: its class
    words: its embedded caption, where captions are read
    """

    url: str
    key: str
    image: bytes
    label: int
    words: Words | None

    @property
    def name(self) -> str:
        """As messages call it."""
        return sample_name(self.url, self.key)


class Source(Protocol):
    """A stream of samples by position."""

    def fetch(self, positions: Tensor, attempts: Tensor) -> list[Found | BadSample]:
        """The samples at (batch,) positions, at attempt 0; at later ones what takes their place."""
        ...


class PastShard(NamedTuple):
    """A shard as a run began with it.

    samples: how many it had
    left_out: why it is not part of the order, None if it is
    source: which of the run's data sets it belongs to
    """

    name: str
    url: str
    samples: int
    left_out: str | None
    source: int = 0


@dataclass(frozen=True)
class Tolerance:
    """What a run puts up with.

    max_bad_fraction: bad samples in an epoch, and shards left out, as a share of all; 0: none
    report: where bad samples are written, None: nowhere
    past: the shards that the run began with; None: it begins now
    """

    max_bad_fraction: float
    report: Path | None
    past: Sequence[PastShard] | None

    @property
    def strict(self) -> bool:
        """Nothing is tolerated: the first fault is an error."""
        return self.max_bad_fraction == 0

    def of_set(self, number: int) -> "Tolerance":
        """The same for one of several data sets."""
        past = None if self.past is None else [one for one in self.past if one.source == number]
        return replace(self, past=past)


@dataclass(frozen=True)
class Bad:
    """A position whose sample was bad, why, and the position whose sample took its place."""

    position: int
    sample: BadSample
    replaced_by: Found


class Rows:
    """The samples at some positions, each replaced until it is good.

    tolerant: else the first bad one is raised
    """

    def __init__(self, source: Source, positions: Tensor, *, tolerant: bool) -> None:
        self._source = source
        self._tolerant = tolerant
        self._positions = positions
        self._attempts = torch.zeros_like(positions)
        self._first: dict[int, BadSample] = {}
        self._samples = source.fetch(positions, self._attempts)
        self._replace_unreadable()

    @property
    def samples(self) -> list[Found]:
        return [sample for sample in self._samples if isinstance(sample, Found)]

    def files(self, chosen: Sequence[int]) -> tuple[list[bytes], list[str]]:
        """Image files of some rows, and what to call them."""
        samples = self.samples
        return [samples[row].image for row in chosen], [samples[row].name for row in chosen]

    @property
    def bad(self) -> list[Bad]:
        """The positions whose own sample was replaced."""
        places, samples = self._positions.tolist(), self.samples
        return [Bad(places[row], why, samples[row]) for row, why in sorted(self._first.items())]

    def apply(self, use: Callable[[Sequence[int]], T]) -> T:
        """What `use` makes of all rows, once none is left that it cannot use.

        use: rows -> anything; raises BadImages for the damaged images among them
        """
        every = range(len(self._samples))
        while True:
            try:
                return use(every)
            except BadImages as error:
                if not self._tolerant:
                    raise
                samples = self.samples
                wrong = {
                    row: BadSample(str(why), url=samples[row].url, key=samples[row].key)
                    for row, why in error.errors.items()
                }
            self._replace(wrong)
            self._replace_unreadable()

    def _replace_unreadable(self) -> None:
        while wrong := {r: s for r, s in enumerate(self._samples) if isinstance(s, BadSample)}:
            self._replace(wrong)

    def _replace(self, wrong: Mapping[int, BadSample]) -> None:
        for row, why in wrong.items():
            if not self._tolerant:
                raise why
            self._first.setdefault(row, why)
            if self._attempts[row] == MOST_SUBSTITUTES:
                raise UserError(f"{why}; neither could any of {MOST_SUBSTITUTES} others be used")
        rows = list(wrong)
        self._attempts[rows] += 1
        fetched = self._source.fetch(self._positions[rows], self._attempts[rows])
        for row, sample in zip(rows, fetched, strict=True):
            self._samples[row] = sample


class Budget:
    """How many bad samples an epoch has had, and may have.

    samples: of an epoch
    total: since the run began
    """

    def __init__(self, max_bad_fraction: float, samples: int) -> None:
        self._fraction, self._samples = max_bad_fraction, samples
        self._epoch, self._in_epoch = 0, 0
        self.total = 0

    def add(self, position: int, bad: int) -> None:
        """Count the bad samples of the batch that begins at `position`.

        Raises UserError when the epoch has had more than are tolerated.
        """
        if not bad:
            return
        epoch = position // self._samples
        in_epoch = bad + (self._in_epoch if epoch == self._epoch else 0)
        allowed = int(self._fraction * self._samples)
        if in_epoch > allowed:
            raise UserError(
                f"{in_epoch} bad samples in this epoch of {self._samples}, and data.max_bad_fraction = "
                f"{self._fraction:g} allows {allowed}; see quarantine.jsonl in the run folder, and repair "
                "them or raise it"
            )
        self._epoch, self._in_epoch = epoch, in_epoch
        self.total += bad

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "in_epoch": self._in_epoch, "total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._epoch, self._in_epoch = state["epoch"], state["in_epoch"]
        self.total = state["total"]


class Quarantine:
    """The report of bad samples and shards; all ranks append to one file, each fact once."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: set[int | str] | None = None

    def add_samples(self, bad: Iterable[Bad]) -> None:
        self._append(
            {
                "position": one.position,
                "url": one.sample.url,
                "key": one.sample.key,
                "reason": str(one.sample),
                "replaced_by": one.replaced_by.name,
            }
            for one in bad
        )

    def add_shards(self, shards: Iterable[PastShard]) -> None:
        """Those that are left out of the order."""
        self._append({"url": one.url, "reason": one.left_out} for one in shards if one.left_out)

    def _append(self, lines: Iterable[dict[str, Any]]) -> None:
        if self._path is None:
            return
        if self._known is None:
            self._known = {_identity(line) for line in read_lines(self._path)}
        new = {_identity(line): line for line in lines if _identity(line) not in self._known}
        if not new:
            return
        self._known.update(new)
        with self._path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            _cut_torn_tail(file)
            # Ranks that share samples find the same ones bad, and one of them is the first to say so.
            said = {_identity(line) for line in read_lines(self._path)}
            text = [
                json.dumps(line, ensure_ascii=False) for key, line in new.items() if key not in said
            ]
            file.write("".join(f"{line}\n" for line in text).encode())
            file.flush()


def _cut_torn_tail(file: IO[bytes]) -> None:
    """Remove what a killed process has left of a line."""
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)


def _identity(line: Mapping[str, Any]) -> int | str:
    """A position is bad once, however often a resume comes by; a shard is left out once."""
    return str(line["url"]) if line.get("position") is None else int(line["position"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON records; none if there is no such file.

    Raises UserError for a line that is no record, unless a killed process left it at the end.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            record["url"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number} is not a record in JSON; remove that line or the file"
            ) from None
        records.append(record)
    return records


def write_past(path: Path, shards: Iterable[PastShard]) -> None:
    """Keep what a run begins with."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(shard._asdict(), ensure_ascii=False) + "\n" for shard in shards)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_past(path: Path) -> list[PastShard] | None:
    """What a run began with; None if that is not known."""
    lines = read_lines(path)
    try:
        return [PastShard(**line) for line in lines] or None
    except TypeError:
        raise UserError(f"{path}: not a list of shards; restore it from a copy") from None
