"""`flowmill bench`: what models and objectives are worth: claims of papers, sampling, experts."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from benchmarks.cli_options import AsJson, run_as_ranks
from flows.errors import UserError
from launch.console import plain

if TYPE_CHECKING:
    from benchmarks.sampling import SamplingCost


def papers(
    only: Annotated[
        list[str] | None, typer.Argument(help="Checks to run; all if none is named.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, data and noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Claims of papers on eight Gaussians: what was asked for, what was found. Minutes on one core."""
    import torch

    from benchmarks.papers import CHECKS, measure

    if unknown := sorted(set(only or []) - CHECKS.keys()):
        raise UserError(f"there is no check {unknown[0]}; use {', '.join(CHECKS)}.")
    torch.set_num_threads(1)  # of so small a network a second thread only waits
    console = plain(stderr=True)

    def note(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    rows = measure(only or list(CHECKS), seed, note)
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows]))
        return
    table = Table("paper", "claim", "gate", "measured", "", title=f"eight Gaussians, seed {seed}")
    for row in rows:
        table.add_row(row.paper, row.claim, row.gate, row.measured, "met" if row.met else "missed")
    plain().print(table)


def sampling(
    recipe: Annotated[
        str, typer.Argument(help="A recipe of a TarFlow or a STARFlow, to be trained first.")
    ] = "tarflow_digits",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it; where none are given, 64 tokens and 300 steps."),
    ] = None,
    run: Annotated[str | None, typer.Option(help="The folder of a trained run instead.")] = None,
    batch: Annotated[list[int], typer.Option(min=1, help="Samples a batch.")] = [1, 4, 16, 64],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every way.")] = 5,
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds after which a way takes no more turns at a batch.")
    ] = 8.0,
    samples: Annotated[int, typer.Option(min=2, help="Samples to judge a way by.")] = 64,
    group: Annotated[int, typer.Option(min=2, help="Tokens of a group of GS-Jacobi.")] = 16,
    tolerance: Annotated[float, typer.Option(min=0, help="Of parallel iterations.")] = 0.03,
    as_json: AsJson = False,
) -> None:
    """Ways to sample a flow: token by token, by parallel iterations, and the automatic choice of these.

    Some minutes on two cores; what is done is told on stderr.
    """
    from benchmarks.sampling import measure_run, train_and_measure
    from trainer.recipe import load_recipe

    console = plain(stderr=True)
    how = {
        "batches": batch, "rounds": rounds, "patience": patience, "samples": samples, "group": group,
    }  # fmt: skip

    def note(text: str) -> None:
        console.print(text, highlight=False)

    if run is not None:
        result = measure_run(run, note, **how, tolerance=tolerance)
    else:
        chosen = load_recipe(recipe, overrides or ["model.patch=2", "train.steps=300"])
        result = train_and_measure(chosen, note, **how, tolerance=tolerance)
    if as_json:
        goals = [asdict(goal) | {"met": goal.met} for goal in result.goals]
        typer.echo(json.dumps(asdict(result) | {"goals": goals}))
        return
    _print_sampling(result)


def _print_sampling(result: "SamplingCost") -> None:
    batches = list(result.ways[0].seconds)
    title = f"{result.model} on {result.device}, {result.threads} threads; {result.samples} samples judged"
    table = Table(
        "way",
        *(f"batch {size}" for size in batches),
        "calls",
        "difference",
        "distance",
        title=title,
    )
    for way in result.ways:
        times = (
            f"{way.seconds[size] * 1e3:.0f} ms, {result.speedup(way.name, size):.2f}x"
            for size in batches
        )
        judged = f"{way.network_calls:.1f}", f"{way.difference:.1e}", f"{way.distance:.4f}"
        table.add_row(way.name, *times, *judged)
    choices = Table("batch", "tokens of a group, the top block first (1: sequential)")
    for size, found in result.choices.items():
        choices.add_row(str(size), ", ".join(str(choice.strategy.group) for choice in found))
    goals = Table("goal", "wanted", "found", "")
    for goal in result.goals:
        met = "met" if goal.met else "missed"
        goals.add_row(goal.what, f"{goal.wanted:g}x", f"{goal.found:.2f}x", met)
    plain().print(table, choices, goals)


def experts(
    count: Annotated[list[int], typer.Option(min=2, help="Numbers of experts.")] = [8, 16, 64],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Turns of either way.")] = 10,
    ranks: Annotated[
        int,
        typer.Option(min=1, help="Ranks that the experts are divided over, beside deepspeed.moe."),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """A mixture of experts against a loop over them on one thread, or over ranks against deepspeed.moe."""
    import torch

    if ranks > 1:
        _experts_over_ranks(count, rounds, ranks, as_json=as_json)
        return

    from benchmarks.experts import CHOSEN, GOAL, SIZES, measure

    torch.set_num_threads(1)
    found = [measure(size, experts, rounds) for size in SIZES for experts in count]
    if as_json:
        rows = [
            asdict(one) | {"ratio": one.ratio, "bound": one.bound, "met": one.met} for one in found
        ]
        typer.echo(json.dumps(rows))
        return
    columns = (
        "layer of",
        "experts",
        "tokens/s",
        "loop's",
        "ratio",
        "goal",
        "products alone",
        "apart",
    )
    table = Table(*columns, title=f"{CHOSEN} experts a token, one thread, median of {rounds}")
    for one in found:
        speeds = (f"{one.tokens / seconds:,.0f}" for seconds in (one.mixture, one.loop))
        met = "" if one.met is None else _met(GOAL, met=one.met)
        bound, apart = f"{one.bound:.2f}x", f"{one.difference:.1e}"
        table.add_row(one.size, str(one.experts), *speeds, f"{one.ratio:.2f}x", met, bound, apart)
    plain().print(table)


def _experts_over_ranks(count: list[int], rounds: int, ranks: int, *, as_json: bool) -> None:
    from benchmarks.expert_exchange import GOAL, check_installed, check_shares, exchange
    from benchmarks.experts import SIZES
    from parallel.processes import start, stop

    check_installed()
    check_shares(count, ranks)
    run_as_ranks(ranks)
    joined = start("cpu", timeout_seconds=600)
    try:
        found = [exchange(joined, size, experts, rounds) for size in SIZES for experts in count]
    finally:
        stop()
    if joined.rank:
        return
    if as_json:
        typer.echo(json.dumps([asdict(one) | {"met": one.met} for one in found]))
        return
    columns = ("layer of", "experts", "tokens/s", "deepspeed.moe's", "ratio", "goal", "apart")
    title = f"experts over {ranks} ranks, every expert as many tokens, median of {rounds}"
    table = Table(*columns, title=title)
    for one in found:
        speeds = (f"{one.tokens / seconds:,.0f}" for seconds in (one.ours, one.theirs))
        ratio, met = f"{one.ratio:.2f}x", _met(GOAL, met=one.met)
        table.add_row(one.size, str(one.experts), *speeds, ratio, met, f"{one.difference:.1e}")
    plain().print(table)


def _met(goal: float, *, met: bool) -> str:
    return f"{goal:g}x {'met' if met else 'missed'}"


def placement(
    seed: Annotated[int, typer.Option(min=0, help="Of the traces.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Experts placed by traces whose answer is known: planted affinity, loads by Zipf's law."""
    from benchmarks.placement import measure

    found = measure(seed)
    if as_json:
        typer.echo(json.dumps([asdict(one) | {"fewer": one.fewer} for one in found]))
        return
    columns = (
        "trace",
        "layers x experts, ranks",
        "way",
        "hops",
        "fewer",
        "planted",
        "max/mean load",
        "",
    )
    table = Table(*columns, title=f"before -> after, seed {seed}")
    for one in found:
        layers, count, ranks = one.shape
        hops = f"{one.before:,} -> {one.after:,}", f"{one.fewer:.1%}"
        hidden = "" if one.planted is None else f"{one.planted:,}"
        loads = f"{one.uneven:.3f} -> {one.evened:.3f}"
        met = "met" if one.met else "missed"
        shape = f"{layers} x {count}, {ranks}"
        table.add_row(one.trace, shape, one.method, *hops, hidden, loads, met)
    plain().print(table)
