"""Ranks whose work is a sleep wait as long as the simulation says."""

from dataclasses import asdict
from typing import Any

import pytest

from benchmarks.pipeline import GAIN, Row, gains, measure, sides_of
from flows.errors import UserError
from parallel.pipeline.catalog import NAMES
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks


def rows(ranks: Ranks, **asked: Any) -> list[dict[str, Any]]:
    return [asdict(row) for row in measure(ranks, **asked)]


def measured(**asked: Any) -> list[Row]:
    first, *others = run_ranks(rows, 4, timeout=250, **asked)
    assert all(other == first for other in others)
    return [Row(**row) for row in first]


@pytest.mark.alone
def test_waits_are_those_predicted_and_bitpipe_waits_less() -> None:
    found = measured(sides=[("interleaved1f1b", 4), ("bitpipe", 4)], seconds=0.08, rounds=2)
    assert [(row.name, row.microbatches) for row in found] == [
        ("interleaved1f1b", 4),
        ("bitpipe", 4),
    ]
    assert [row.predicted for row in found] == pytest.approx([3 / 11, 1 / 7], abs=1e-12)
    assert all(row.met for row in found), found
    assert GAIN[0] <= gains(found)[4] <= GAIN[1]


def test_a_schedule_that_is_named_is_not_left_out_without_a_word() -> None:
    assert ("dualpipev", 2) not in sides_of(None, 4, [2])
    with pytest.raises(UserError, match=r"--microbatches = 2 is too few for dualpipev on 4 ranks"):
        sides_of(["dualpipev"], 4, [2])


@pytest.mark.slow
def test_waits_of_all_schedules() -> None:
    found = measured(sides=sides_of(None, 4, [4, 8]), seconds=0.12, rounds=3)
    assert len(found) == 2 * len(NAMES) - 1  # DualPipeV takes 8 or more on 4 ranks
    assert [row for row in found if not row.met] == []
    assert all(GAIN[0] <= gain <= GAIN[1] for gain in gains(found).values())
