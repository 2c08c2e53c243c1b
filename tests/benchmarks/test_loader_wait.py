"""What is said of waiting is what was waited."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.loader_sides import Setting
from benchmarks.loader_wait import beside_a_device

TINY = ["digits8", "model.width=16", "model.depth=1", "train.batch=8"]


@pytest.fixture(autouse=True)
def _own_index_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.alone
def test_steps_shorter_than_decoding_wait_and_longer_ones_do_not() -> None:
    busy = beside_a_device(Setting(batch=32, workers=1), step=0.0, steps=6, warm_up=1)
    idle = beside_a_device(Setting(batch=1, workers=1), step=0.2, steps=3, warm_up=1)
    assert (busy.steps, idle.steps) == (6, 3)
    assert busy.share > 0.9  # a step of nothing is all waiting
    assert idle.step_seconds >= 0.2
    assert idle.share < busy.share / 3
    assert idle.longest_seconds < 0.2


def test_the_command_prints_both_as_json() -> None:
    result = CliRunner().invoke(
        app, ["wait", *TINY, "--steps", "3", "--device-ms", "1", "--batch", "2", "--json"]
    )
    assert result.exit_code == 0, result.output
    training, device = json.loads(result.output)
    assert training["what"].startswith("digits8")
    for found in (training, device):
        assert found["steps"] == 3
        assert 0 <= found["share"] <= 1
        assert found["longest_seconds"] >= 0
        assert found["step_seconds"] > 0
