"""What a report keeps to draw with does not grow with the run."""

import resource
from itertools import pairwise
from pathlib import Path

import pytest

from flows.errors import UserError
from tests.trainer import runs
from trainer.reporting import CURVE_POINTS, Curve, Report
from trainer.run_folder import RunFolder
from trainer.tracking import Silent


def test_a_full_disk_ends_a_run_in_a_sentence(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk."""
    report = Report(RunFolder(tmp_path), Silent(), runs.Silence(), runs.recipe(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(UserError, match=r"takes no more files .*; free some room"):
            report.step({"step": 1, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        report.close()


@pytest.mark.parametrize(
    ("step", "skipped", "said"),
    [
        (5, 0, "done after step 5 of 5; pictures"),
        (5, 2, "done after step 5 of 5, 2 of them skipped (the gradient was not finite); pictures"),
        (3, 1, "stopped after step 3 of 5, 1 of them skipped"),
    ],
)
def test_the_last_line_says_how_many_steps_were_skipped(
    tmp_path: Path, step: int, skipped: int, said: str
) -> None:
    heard = runs.Silence()
    report = Report(RunFolder(tmp_path), Silent(), heard, runs.recipe(tmp_path))
    report.end(step, 5, skipped)
    report.close()
    assert heard.heard[-1].startswith(said)


def test_curve_thins_evenly_and_keeps_resumes() -> None:
    curve = Curve()
    for step in range(1, 40_001):
        line = {"step": step, "loss": 1.0 / step, "grad_norm": 1.0, "skipped": 0, "lr": 0.1}
        curve.append(line | ({"resumed": True} if step == 12_345 else {}))
    steps = [line["step"] for line in curve.lines]
    assert len(steps) <= CURVE_POINTS
    assert 12_345 in steps
    steps.remove(12_345)
    gaps = {b - a for a, b in pairwise(steps)}
    assert len(gaps) == 1, f"uneven after thinning: {gaps}"
    assert steps[-1] > 39_900
