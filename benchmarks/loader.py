"""Our loader against others: samples a second, and how long it takes to go on late in an epoch.

Speed: every side in turn, several times over, opens anew, fills its queues, and is timed over the same
number of batches of 256 x 256 JPEGs. Going on: the time from opening the data to the first batch, from a
state taken at 90 % of an epoch of many small JPEGs. The sides' images are compared with pillow's, sample by
sample, so that nobody is quick because of less work; and each side has a process of its own.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loader_apart import SPARE, TIMED, WARM_UP, Apart
from benchmarks.loader_shards import make_shards
from benchmarks.loader_sides import SIDES, Flowmill, Setting, WebDataset

SIZE, SMALL_SIZE = 256, 64
SHARDS, MANY_SHARDS = 8, 40
AT = 0.9

Note = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One side.

    speed: samples a second, the median of the rounds; None: not installed
    resume_seconds: median; None: not measured
    difference: the largest mean difference of an image from pillow's, of a range of 2
    """

    name: str
    install: str
    speed: float | None = None
    resume_seconds: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Goal:
    what: str
    wanted: float
    found: float | None

    @property
    def met(self) -> bool:
        return self.found is not None and self.found >= self.wanted


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    goals: list[Goal]
    setting: Setting
    rounds: int
    resumed_at: int


def compare(setting: Setting, *, rounds: int, resume_samples: int, note: Note) -> Comparison:
    """Measure every side that is installed.

    resume_samples: in the epoch at 90 % of which loaders go on; 0: not measured
    note: told what is going on
    """
    at = int(AT * resume_samples / setting.batch) // setting.workers * setting.workers
    with (
        tempfile.TemporaryDirectory(prefix="loader-") as folder,
        contextlib.ExitStack() as processes,
    ):
        sides = _open(Path(folder, "large"), setting, note, processes)
        differences = [_compare_images(side, note) for side in sides]
        speeds = _interleaved([side.speed for side in sides], rounds, note)
        resumes: list[float | None] = [None] * len(sides)
        if resume_samples:
            _reach(sides, Path(folder, "small"), setting, resume_samples, at, note)
            resumes = list(_interleaved([side.resume for side in sides], rounds, note))
    measured = {
        side.name: Row(side.name, side.kind.install, *numbers)
        for side, *numbers in zip(sides, speeds, resumes, differences, strict=True)
    }
    rows = [measured.get(kind.name, Row(kind.name, kind.install)) for kind in SIDES]
    return Comparison(rows, judge(rows), setting, rounds, at * setting.batch)


def _open(
    folder: Path, setting: Setting, note: Note, processes: contextlib.ExitStack
) -> list[Apart]:
    """The sides that are installed, on shards for speed."""
    note(f"writing JPEGs of {SIZE} x {SIZE} pixels")
    needed = (WARM_UP + TIMED + SPARE) * setting.batch
    shards = make_shards(folder, samples=needed, size=SIZE, shards=SHARDS)
    sides: list[Apart] = []
    for kind in SIDES:
        try:
            sides.append(Apart(kind, shards, setting))
        except ImportError as error:
            note(f"{kind.name} is not installed ({error}): {kind.install}")
        else:
            processes.callback(sides[-1].close)
    return sides


def _compare_images(side: Apart, note: Note) -> float:
    difference = side.difference()
    note(f"{side.name}: images differ from pillow's by {difference:.1e} at most")
    return difference


def _reach(
    sides: Sequence[Apart], folder: Path, setting: Setting, samples: int, at: int, note: Note
) -> None:
    """Take every side to `at` batches of an epoch of small images."""
    note(f"writing {samples:,} JPEGs of {SMALL_SIZE} x {SMALL_SIZE} pixels")
    shards = make_shards(folder, samples=samples, size=SMALL_SIZE, shards=MANY_SHARDS)
    for side in sides:
        note(f"{side.name}: to sample {at * setting.batch:,}")
        side.take(shards)
        side.reach(at)


def _interleaved(turns: Sequence[Callable[[], float]], rounds: int, note: Note) -> list[float]:
    """The median of each, taken in turn, every round beginning with another."""
    found: list[list[float]] = [[] for _ in turns]
    for number in range(rounds):
        note(f"round {number + 1} of {rounds}")
        for turn in range(len(turns)):
            place = (turn + number) % len(turns)
            found[place].append(turns[place]())
    return [statistics.median(times) for times in found]


def judge(rows: Sequence[Row]) -> list[Goal]:
    """What is wanted of us, beside what was found."""
    own = {kind.name for kind in SIDES if issubclass(kind, Flowmill)}
    best = max((row for row in rows if row.name in own), key=lambda row: row.speed or 0.0)
    fastest = max((row.speed or 0.0 for row in rows if row.name not in own), default=None)
    skipping = next(row for row in rows if row.name == WebDataset.name)
    return [
        Goal("speed over the fastest other", 1.0, _ratio(best.speed, fastest)),
        Goal(f"speed over {skipping.name}", 1.5, _ratio(best.speed, skipping.speed)),
        Goal(
            f"going on sooner than {skipping.name}",
            100.0,
            _ratio(skipping.resume_seconds, best.resume_seconds),
        ),
    ]


def _ratio(first: float | None, second: float | None) -> float | None:
    return first / second if first is not None and second else None
