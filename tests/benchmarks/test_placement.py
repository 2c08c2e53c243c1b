"""The command that places experts by traces of a known answer: every goal is met."""

import json

from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.placement import NOISES, SHAPES, STEEP


def test_every_goal_is_met_and_noise_up_to_0_3_leaves_a_third_of_the_hops() -> None:
    result = CliRunner().invoke(app, ["placement", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert len(rows) == len(SHAPES) * len(NOISES) + len(STEEP)
    for row in rows:
        assert row["met"], row
        if row["planted"] is not None and not row["trace"].endswith("0.5"):
            assert row["fewer"] >= 0.67, row
