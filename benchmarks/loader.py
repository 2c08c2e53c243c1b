"""Our loader against others: samples a second, and how long it takes to go on late in an epoch.

Speed: every side in turn, several times over, opens anew, fills its queues, and is timed over the same
number of batches of 256 x 256 JPEGs. Going on: the time from nothing to the first batch, from a state
taken at 90 % of an epoch of many small JPEGs. The sides' images are compared with pillow's, sample by
sample, so that nobody is quick because of less work.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.loader_shards import Shards, make_shards
from benchmarks.loader_sides import SIDES, Flowmill, Setting, Side, WebDataset

SIZE, SMALL_SIZE = 256, 64
SHARDS, MANY_SHARDS = 8, 40
# More batches than any side holds ready before it is first asked; and some that are never asked for, so
# that no side comes to its end while it is timed.
WARM_UP, TIMED, SPARE = 12, 36, 12
AT = 0.9
# Decoders may round differently; a wrong image, or a wrong place, is off by tenths.
TOLERANCE = 2 / 255

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
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        large = Path(folder, "large")
        sides, speeds, differences = _measure_speed(large, setting, rounds, note)
        resumes: list[float | None] = [None] * len(sides)
        if resume_samples:
            small = Path(folder, "small")
            resumes = list(_measure_resume(sides, small, setting, resume_samples, at, rounds, note))
    measured = {
        side.name: Row(side.name, side.install, *numbers)
        for side, *numbers in zip(sides, speeds, resumes, differences, strict=True)
    }
    rows = [measured.get(kind.name, Row(kind.name, kind.install)) for kind in SIDES]
    return Comparison(rows, judge(rows), setting, rounds, at * setting.batch)


def _measure_speed(
    folder: Path, setting: Setting, rounds: int, note: Note
) -> tuple[list[Side], list[float], list[float]]:
    """The sides that are installed, their samples a second, and how far their images are off."""
    note(f"writing JPEGs of {SIZE} x {SIZE} pixels")
    needed = (WARM_UP + TIMED + SPARE) * setting.batch
    shards = make_shards(folder, samples=needed, size=SIZE, shards=SHARDS)
    sides: list[Side] = []
    for kind in SIDES:
        try:
            sides.append(kind(shards, setting))
        except ImportError as error:
            note(f"{kind.name} is not installed ({error}): {kind.install}")
    differences = [check_images(side, shards, note) for side in sides]
    speeds = _interleaved(
        [partial(time_batches, side, setting.batch) for side in sides], rounds, note
    )
    return sides, speeds, differences


def _measure_resume(
    sides: Sequence[Side],
    folder: Path,
    setting: Setting,
    samples: int,
    at: int,
    rounds: int,
    note: Note,
) -> list[float]:
    """Seconds each side takes to go on after `at` batches of an epoch of small images."""
    note(f"writing {samples:,} JPEGs of {SMALL_SIZE} x {SMALL_SIZE} pixels")
    shards = make_shards(folder, samples=samples, size=SMALL_SIZE, shards=MANY_SHARDS)
    turns = []
    for kind in [type(side) for side in sides]:
        side = kind(shards, setting)
        note(f"{side.name}: to sample {at * setting.batch:,}")
        turns.append(partial(time_resume, side, side.state_after(at)))
    return _interleaved(turns, rounds, note)


def _interleaved(turns: Sequence[Callable[[], float]], rounds: int, note: Note) -> list[float]:
    """The median of each, taken in turn, every round beginning with another."""
    found: list[list[float]] = [[] for _ in turns]
    for number in range(rounds):
        note(f"round {number + 1} of {rounds}")
        for turn in range(len(turns)):
            place = (turn + number) % len(turns)
            found[place].append(turns[place]())
    return [statistics.median(times) for times in found]


def time_batches(side: Side, batch: int) -> float:
    """Samples a second, after the queues have been filled and emptied once."""
    iterator = side.open(None)
    for _ in itertools.islice(iterator, WARM_UP):
        pass
    began = time.perf_counter()
    count = sum(1 for _ in itertools.islice(iterator, TIMED))
    seconds = time.perf_counter() - began
    iterator.close()
    return count * batch / seconds


def time_resume(side: Side, state: Any) -> float:
    """Seconds from nothing to the first batch from `state`."""
    began = time.perf_counter()
    iterator = side.open(state)
    next(iterator)
    seconds = time.perf_counter() - began
    iterator.close()
    return seconds


def check_images(side: Side, shards: Shards, note: Note) -> float:
    """The largest mean difference of an image of the first batches from pillow's.

    Raises ValueError where a side hands over other images than it says.
    """
    iterator = side.open(None)
    largest = 0.0
    for images, labels in itertools.islice(iterator, 3):
        for image, label in zip(images, labels.tolist(), strict=True):
            largest = max(largest, float((image - shards.decoded(label)).abs().mean()))
    iterator.close()
    if largest > TOLERANCE:
        raise ValueError(f"{side.name}: an image differs by {largest:.3f} from what pillow decodes")
    note(f"{side.name}: images differ from pillow's by {largest:.1e} at most")
    return largest


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
