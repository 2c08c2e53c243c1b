"""Going on late in an epoch takes as long as going on early: nothing is read to get there."""

import shutil
import statistics
import time

import pytest

from data_pipeline.indexes import update_catalogs
from tests.data_pipeline.conftest import sample, write_tar
from tests.data_pipeline.test_loader import loader, numbers, stream_of

pytestmark = pytest.mark.alone

SAMPLES, SHARDS = 100_000, 40
EARLY, LATE = 100, 90_000


@pytest.fixture(scope="module")
def hundred_thousand(tmp_path_factory):
    """Shards with the smallest images there are, and the index that `flowmill data index` makes."""
    folder = tmp_path_factory.mktemp("many")
    members = [m for n in range(SAMPLES // SHARDS) for m in sample(f"{n:06d}", n % 256, n % 10)]
    first = write_tar(folder / "train-00.tar", members)
    for shard in range(1, SHARDS):
        shutil.copy2(first, f"{folder}/train-{shard:02d}.tar")
    update_catalogs(f"{folder}/train-*.tar")
    return f"{folder}/train-*.tar"


def resume(pattern, position):
    """Seconds from nothing but a state to the first batch, and the numbers of its samples."""
    state = stream_of(pattern, seed=1, lanes=64, window=256).state_at(position)
    began = time.perf_counter()
    with loader(pattern, batch=64, lanes=64, window=256) as batches:
        batches.load_state_dict(state)
        batch = next(batches)
        seconds = time.perf_counter() - began
        assert batch.position[0] == position
        return seconds, numbers(batch)


def test_resuming_at_sample_90000_takes_the_time_of_resuming_at_sample_100(hundred_thousand):
    rounds = [[resume(hundred_thousand, position) for position in (EARLY, LATE)] for _ in range(9)]
    early, late = (
        statistics.median(seconds for seconds, _ in side) for side in zip(*rounds, strict=True)
    )
    ratio = late / early
    assert 1 / 1.3 <= ratio <= 1.3, (
        f"{early * 1e3:.1f} ms at {EARLY}, {late * 1e3:.1f} ms at {LATE}"
    )
    # Each came to its own place, the same every time.
    assert all(
        side[1] == first[1] for pair in rounds for side, first in zip(pair, rounds[0], strict=True)
    )
    assert rounds[0][0][1] != rounds[0][1][1]
