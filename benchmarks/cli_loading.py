"""`flowmill bench`: how fast samples are read, and how long steps wait for them."""

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from benchmarks.cli_options import AsJson, Overrides, RecipeArgument
from launch.console import plain

if TYPE_CHECKING:
    from benchmarks.loader import Comparison


def loader(
    batch: Annotated[int, typer.Option(min=1, help="Samples a batch.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads or processes that decode; as many as cores.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every side.")] = 5,
    resume_samples: Annotated[
        int, typer.Option(min=0, help="Samples of the epoch to go on in at 90 %; 0: do not.")
    ] = 100_000,
    as_json: AsJson = False,
) -> None:
    """Our loader against others on this machine: samples a second, and going on late in an epoch."""
    from benchmarks.loader import compare
    from benchmarks.loader_sides import Setting

    console = plain(stderr=True)
    result = compare(
        Setting(batch, workers or os.cpu_count() or 1),
        rounds=rounds,
        resume_samples=resume_samples,
        note=lambda text: console.print(text, highlight=False),
    )
    if as_json:
        goals = [asdict(goal) | {"met": goal.met} for goal in result.goals]
        typer.echo(json.dumps(asdict(result) | {"goals": goals}))
        return
    _print_comparison(result)


def wait(
    recipe: RecipeArgument = "digits",
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are measured.")] = 200,
    device_ms: Annotated[
        float, typer.Option(min=0, help="What a step of a device takes, in milliseconds.")
    ] = 50.0,
    batch: Annotated[int, typer.Option(min=1, help="JPEGs that such a step asks for.")] = 64,
    as_json: AsJson = False,
) -> None:
    """How long steps wait for data: of a recipe as it trains here, and of JPEGs for a device."""
    from benchmarks.loader_sides import Setting
    from benchmarks.loader_wait import beside_a_device, in_training

    setting = Setting(batch, os.cpu_count() or 1)
    found = [
        in_training(recipe, overrides or [], steps=steps, warm_up=20),
        beside_a_device(setting, step=device_ms / 1e3, steps=steps, warm_up=20),
    ]
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
        return
    table = Table("", "median step", "waits for data", "longest wait", title=f"{steps} steps each")
    for one in found:
        step, longest = (f"{s * 1e3:.1f} ms" for s in (one.step_seconds, one.longest_seconds))
        table.add_row(one.what, step, f"{one.share:.2%} of the time", longest)
    plain().print(table)


def _print_comparison(result: "Comparison") -> None:
    title = (
        f"JPEG 256 x 256, batches of {result.setting.batch}, {result.setting.workers} workers, median of "
        f"{result.rounds} rounds; going on at sample {result.resumed_at:,}"
    )
    table = Table("loader", "samples/s", "goes on in", "differs by", title=title)
    for row in result.rows:
        if row.speed is None:
            table.add_row(row.name, f"not installed: {row.install}")
            continue
        resume = f"{row.resume_seconds:.3f} s" if row.resume_seconds else ""
        table.add_row(row.name, f"{row.speed:,.0f}", resume, f"{row.difference:.1e}")
    goals = Table("goal", "wanted", "found", "")
    for goal in result.goals:
        found = "not measured" if goal.found is None else f"{goal.found:.2f}x"
        goals.add_row(goal.what, f"{goal.wanted:g}x", found, "met" if goal.met else "missed")
    plain().print(table, goals)
