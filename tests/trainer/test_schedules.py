"""The learning rate is a bounded function of the step, without jumps, and ends where it should."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.schedules import learning_rate

runs = st.fixed_dictionaries(
    {
        "lr": st.floats(1e-6, 1.0),
        "warmup": st.integers(0, 50),
        "steps": st.integers(60, 400),
        "schedule": st.sampled_from(["cosine", "linear", "constant"]),
        "final_lr": st.floats(0.0, 1.0),
    }
)


@given(runs)
def test_rates_lie_between_zero_and_the_larger_of_peak_and_final(run):
    top = max(run["lr"], run["final_lr"]) * (1 + 1e-12)
    rates = [learning_rate(step, **run) for step in range(run["steps"] + 10)]
    assert all(0 <= rate <= top for rate in rates)
    assert max(rates[: max(run["warmup"], 1)]) == pytest.approx(run["lr"])


@given(runs)
def test_the_last_step_has_the_final_rate_and_keeps_it(run):
    end = run["lr"] if run["schedule"] == "constant" else run["final_lr"]
    for step in (run["steps"] - 1, run["steps"], run["steps"] + 1000):
        assert learning_rate(step, **run) == pytest.approx(end, rel=1e-9, abs=1e-15)


@given(runs)
def test_no_step_jumps(run):
    """A cosine's steepest step is pi/2 times that of a line over the same steps."""
    rates = [learning_rate(step, **run) for step in range(run["steps"])]
    warm = run["lr"] / max(run["warmup"], 1)
    decay_steps = run["steps"] - 1 - max(run["warmup"] - 1, 0)
    decay = math.pi / 2 * abs(run["lr"] - run["final_lr"]) / decay_steps
    limit = max(warm if run["warmup"] > 1 else 0.0, decay) * (1 + 1e-9) + 1e-15
    assert all(abs(b - a) <= limit for a, b in pairwise(rates))


def test_known_values():
    kwargs = {"lr": 1.0, "warmup": 4, "steps": 12, "final_lr": 0.2}
    warm = [learning_rate(step, schedule="cosine", **kwargs) for step in range(4)]
    assert warm == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(7, schedule="linear", **kwargs) == pytest.approx(0.6)
    assert learning_rate(7, schedule="cosine", **kwargs) == pytest.approx(0.6)
    assert learning_rate(5, schedule="cosine", **kwargs) == pytest.approx(
        0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2
    )
    assert learning_rate(0, lr=1.0, warmup=0, steps=1, schedule="cosine", final_lr=0.0) == 1.0
