"""The benchmark of experts times two ways to the same numbers."""

import json

from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.experts import SIZES, measure


def test_mixture_and_loop_compute_the_same() -> None:
    found = measure("dit_moe_digits", 4, rounds=2)
    assert found.difference < 1e-5
    assert found.tokens == 1024
    assert min(found.mixture, found.loop, found.products) > 0
    assert found.bound > found.ratio


def test_the_command_prints_json_and_a_table(monkeypatch) -> None:
    monkeypatch.setitem(SIZES, "DiT-MoE-S/2", (64, 64, 2, 16))
    printed = CliRunner().invoke(app, ["experts", "--count", "4", "--rounds", "1", "--json"])
    assert printed.exit_code == 0, printed.output
    rows = json.loads(printed.stdout)
    assert [row["size"] for row in rows] == list(SIZES)
    assert all(row["ratio"] > 0 for row in rows)
    table = CliRunner().invoke(app, ["experts", "--count", "4", "--rounds", "1"])
    assert "products" in table.stdout
