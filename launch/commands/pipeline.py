"""`flowmill pipeline`: see a schedule before it runs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from flows.errors import UserError
from launch.commands.sample import check_picture

if TYPE_CHECKING:
    from parallel.pipeline.timeline import Timeline

app = typer.Typer(help="Show pipeline schedules.", no_args_is_help=True)
LARGEST = 2**12  # boxes for forwards: a picture of more shows nothing


@app.callback()
def pipeline() -> None:
    """Show pipeline schedules."""


@app.command()
def show(
    schedule: Annotated[
        str,
        typer.Option(
            help="gpipe, 1f1b, interleaved1f1b, looped_bfs, interleaved_zero_bubble, zbv, dualpipev, "
            "chimera or bitpipe."
        ),
    ] = "bitpipe",
    stages: Annotated[int, typer.Option(help="Ranks that one model lies on.")] = 4,
    microbatches: Annotated[int, typer.Option(help="Microbatches of a step.")] = 8,
    chunks: Annotated[
        int | None, typer.Option(help="Stages on every rank, where the schedule leaves it open.")
    ] = None,
    forward: Annotated[float, typer.Option(help="Cost of a forward of one stage.")] = 1.0,
    input: Annotated[float, typer.Option(help="Cost of the gradient of its input.")] = 1.0,
    weight: Annotated[float, typer.Option(help="Cost of the gradient of its weights.")] = 1.0,
    latency: Annotated[float, typer.Option(help="Cost of a result's way to another rank.")] = 0.0,
    png: Annotated[Path | None, typer.Option(help="Draw the timeline into this file.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the timeline into this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the timeline as JSON.")] = False,
) -> None:
    """What every rank does and when it waits, from the object that is executed."""
    from parallel.pipeline.catalog import Words, make_schedule
    from parallel.pipeline.picture import draw
    from parallel.pipeline.timeline import equal_costs, simulate

    _check_costs(forward=forward, input=input, weight=weight, latency=latency)
    if max(stages, 1) * max(microbatches, 1) * max(chunks or 2, 1) > LARGEST:
        raise UserError(
            f"--stages {stages} and --microbatches {microbatches} are too many to show; their product "
            f"with the stages on a rank may be {LARGEST}."
        )
    for option, path, suffix in (("--png", png, ".png"), ("--svg", svg, ".svg")):
        if path is not None:
            check_picture(option, path, suffix)
    words = Words("--schedule", "--stages", "--microbatches", "--chunks")
    made = make_schedule(schedule, stages, microbatches, chunks, words)
    timeline = simulate(made, equal_costs(made.stages, forward, input, weight, latency))
    for path in filter(None, (png, svg)):
        draw(timeline, path)
    if as_json:
        typer.echo(json.dumps(_record(timeline)))
        return
    _print(timeline)


def _check_costs(**costs: float) -> None:
    for name, value in costs.items():
        if not 0 <= value < float("inf"):
            raise UserError(f"--{name} = {value} is no cost; use a number of 0 or more.")
    if not costs["forward"] or not costs["input"] + costs["weight"]:
        raise UserError("--forward, and --input or --weight, must be above 0.")


def _print(timeline: "Timeline") -> None:
    made = timeline.schedule
    title = f"{made.name}, {made.microbatches} microbatches: {timeline.bubble:.1%} idle"
    table = Table("rank", "stages", "busy", "idle", "peak activations", title=title)
    for rank in range(made.ranks):
        held = ", ".join(f"{stage}{'^' if up else ''}" for up, stage in made.local(rank))
        table.add_row(
            str(rank),
            held,
            f"{timeline.busy(rank):g}",
            f"{timeline.idle(rank):.1%}",
            f"{timeline.peak_activations[rank]:g}",
        )
    Console().print(table)
    typer.echo("A peak of activations is counted in microbatches of one rank's share of the model.")
    if made.directions == 2:
        typer.echo("^ marks the replica that runs from the last rank to the first.")


def _record(timeline: "Timeline") -> dict[str, Any]:
    made = timeline.schedule
    return {
        "schedule": made.name,
        "microbatches": made.microbatches,
        "stages": made.stages,
        "makespan": timeline.makespan,
        "bubble": timeline.bubble,
        "ranks": [
            {
                "idle": timeline.idle(rank),
                "peak_activations": timeline.peak_activations[rank],
                "actions": [
                    {
                        "work": event.action.work.value,
                        "stage": event.action.stage,
                        "microbatch": event.action.microbatch,
                        "direction": event.action.direction,
                        "start": event.start,
                        "end": event.end,
                    }
                    for event in row
                ],
            }
            for rank, row in enumerate(timeline.events)
        ],
    }
