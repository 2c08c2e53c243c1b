"""What a report keeps to draw with does not grow with the run."""

from itertools import pairwise

from trainer.reporting import CURVE_POINTS, Curve


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
