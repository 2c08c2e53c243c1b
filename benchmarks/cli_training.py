"""`flowmill bench`: what a training step costs, in time and in memory, and by whom it is moved."""

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.cli_options import AsJson, Overrides, RecipeArgument, run_as_ranks
from launch.console import plain


def overhead(
    recipe: RecipeArgument = "digits",
    overrides: Overrides = None,
    pairs: Annotated[int, typer.Option(min=10, help="Steps of either side.")] = 200,
    as_json: AsJson = False,
) -> None:
    """The trainer's step against a hand-written loop: same arithmetic, same tensors, in turn, one rank."""
    from benchmarks.overhead import measure
    from trainer.recipe import load_recipe

    result = measure(load_recipe(recipe, overrides or []), pairs, warm_up=20)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
        return
    table = Table("", "median step", title=f"{recipe}, {pairs} paired steps, one rank")
    table.add_row("flowmill", f"{result.trainer_seconds * 1e3:.2f} ms")
    table.add_row("hand-written loop", f"{result.loop_seconds * 1e3:.2f} ms")
    table.add_row("median of paired ratios", f"{result.ratio:.4f}")
    table.add_row("weights apart after the warm-up", f"{result.weight_difference:.1e}")
    plain().print(table)


def engines(
    recipe: RecipeArgument = "digits",
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=10, help="Steps of every side.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Every engine against bare PyTorch loops: two ranks, same tensors, step by step in turn."""
    from trainer.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    run_as_ranks(2)
    from benchmarks.engines import measure

    result = measure(loaded, rounds, warm_up=20)
    if os.environ["RANK"] != "0":
        return
    if as_json:
        goals = [{"side": name, "speed": speed, "met": met} for name, speed, met in result.goals]
        typer.echo(json.dumps(asdict(result) | {"goals": goals}))
        return
    title = (
        f"{recipe}, {result.parameters / 1e6:.1f} M parameters, batch {result.batch} over {result.ranks} "
        f"ranks, {result.rounds} rounds"
    )
    table = Table("side", "median step", "speed", "of", "weights apart", title=title)
    for row in result.rows:
        if row.seconds is None or row.speed is None:
            table.add_row(row.name, "not installed")
            continue
        apart = f"{row.difference:.1e}"
        table.add_row(
            row.name, f"{row.seconds * 1e3:.1f} ms", f"{row.speed:.3f}x", row.against, apart
        )
    plain().print(table)


def step(
    recipe: RecipeArgument = "digits",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=3, help="Steps to measure.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Where a training step's time goes, beside bare matrix products of the same run."""
    from benchmarks.step import measure
    from trainer.recipe import load_recipe

    result = measure(load_recipe(recipe, overrides or []), steps)
    if as_json:
        typer.echo(json.dumps(asdict(result) | {"of_peak": result.of_peak}))
        return
    where = (
        f"{result.device}, {result.threads} threads" if result.device == "cpu" else result.device
    )
    table = Table("", "", title=f"a training step of {recipe}, {where}, median of {steps}")
    table.add_row("step", f"{result.seconds * 1e3:.1f} ms")
    table.add_row("matrix products in it", f"{result.flops / 1e9:.1f} GFLOP")
    table.add_row("bare matrix products", f"{result.peak / 1e9:.1f} GFLOP/s")
    table.add_row("step as a fraction of that", f"{result.of_peak:.3f}")
    for kind, share in sorted(result.shares.items(), key=lambda item: -item[1]):
        table.add_row(f"profiled time: {kind}", f"{share:.1%}")
    plain().print(table)


def memory(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the run; none is started.")] = 1,
    as_json: AsJson = False,
) -> None:
    """What each of many ranks would hold of a model: nothing is allocated, no data is read."""
    from benchmarks.memory import HELD, measure
    from trainer.recipe import load_recipe

    found = measure(load_recipe(recipe, overrides or []), ranks)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"total": found.total}))
        return
    where = ", state on the host" if found.offloaded else ""
    title = (
        f"{found.whole:,} parameters on {ranks} ranks ({found.layout or 'whole'}){where}, a rank"
    )
    table = Table("", "MiB", title=title)
    for name in (*HELD, "total"):
        table.add_row(name, f"{getattr(found, name) / 2**20:,.1f}")
    plain().print(table)


def pipeline(
    only: Annotated[
        list[str] | None, typer.Argument(help="Schedules to run; all if none is named.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=2, max=16, help="Ranks that the pipeline lies on.")] = 4,
    microbatches: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Microbatches of a step; 4 and 8 if none is named."),
    ] = None,
    milliseconds: Annotated[
        float, typer.Option(min=1, help="Of a forward of one rank's share of the model.")
    ] = 80.0,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of every schedule.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Pipeline schedules on real ranks whose work is a sleep: how long they wait, and what was predicted."""
    from benchmarks.pipeline import GAIN, gains, measure, sides_of
    from parallel.processes import start, stop

    sides = sides_of(only, ranks, microbatches or [4, 8])  # refused before ranks start
    run_as_ranks(ranks)

    joined = start("cpu", 120.0)
    try:
        rows = measure(joined, sides, milliseconds / 1e3, rounds)
    finally:
        stop()
    if not joined.is_first:
        return
    found = gains(rows)
    if as_json:
        told = [asdict(row) | {"met": row.met} for row in rows]
        typer.echo(json.dumps({"rows": told, "gains": found}))
        return
    title = (
        f"{ranks} ranks, {milliseconds:g} ms a forward of a rank's share, best of {rounds} steps"
    )
    table = Table("schedule", "microbatches", "step", "idle", "predicted", "", title=title)
    for row in rows:
        shares = f"{row.idle:.1%}", f"{row.predicted:.1%}", "met" if row.met else "missed"
        table.add_row(row.name, str(row.microbatches), f"{row.seconds * 1e3:.0f} ms", *shares)
    goal = Table("microbatches", "BitPipe over interleaved 1F1B", "goal", "")
    for number, gain in found.items():
        met = "met" if GAIN[0] <= gain <= GAIN[1] else "missed"
        goal.add_row(str(number), f"{gain:.3f}x", f"{GAIN[0]} to {GAIN[1]}x", met)
    plain().print(table, *([goal] if found else []))
