"""The benchmark of experts times two ways to the same numbers."""

import json
from dataclasses import asdict
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.expert_exchange import LARGEST_DIFFERENCE, balanced, exchange
from benchmarks.experts import SIZES, measure
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks


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


def over_ranks(ranks: Ranks) -> dict[str, Any]:
    return asdict(exchange(ranks, "dit_moe_digits", 8, rounds=1))


def test_over_ranks_both_compute_the_same() -> None:
    pytest.importorskip("deepspeed")
    first, second = run_ranks(over_ranks, 2)
    assert first == second
    assert first["difference"] <= LARGEST_DIFFERENCE
    assert min(first["ours"], first["theirs"], first["ratio"]) > 0
    assert first["tokens"] == 2048


def test_every_expert_gets_as_many_tokens() -> None:
    logits = balanced(4, 16, 32, 8, seed=3)[..., :8].reshape(-1, 8)
    best = logits.topk(3, dim=-1)
    for choice in range(2):
        assert best.indices[:, choice].bincount(minlength=8).tolist() == [8] * 8
    assert (best.values[:, 1] - best.values[:, 2]).min() > 1.0, "a tie would turn by rounding"


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            ["--count", "9"],
            "--count 9 of a layer of dit_moe_digits cannot be shared equally by 2 ranks",
        ),
        (["--count", "128"], "at most 64"),
    ],
)
def test_numbers_that_cannot_be_shared_are_refused(asked: list[str], sentence: str) -> None:
    refused = CliRunner().invoke(app, ["experts", "--ranks", "2", *asked])
    assert sentence in str(refused.exception)
