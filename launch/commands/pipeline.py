"""`flowmill pipeline`: see a schedule, and how a model would be cut, before anything runs."""

import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.errors import UserError
from launch.commands.sample import check_picture
from launch.console import plain

if TYPE_CHECKING:
    from flows.models.chain import Chain
    from parallel.pipeline.timeline import Timeline

app = typer.Typer(
    help="Show pipeline schedules, and how models are cut into stages.", no_args_is_help=True
)
LARGEST = 2**12  # boxes for forwards: a picture of more shows nothing
DEAREST = 1e12
TIMED = 4  # samples


@app.callback()
def pipeline() -> None:
    """Show pipeline schedules, and how models are cut into stages."""


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


@app.command()
def cut(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to it, as section.key=value; model.name=... for the zoo."),
    ] = None,
    schedule: Annotated[str, typer.Option(help="As in `flowmill pipeline show`.")] = "1f1b",
    stages: Annotated[int, typer.Option(help="Ranks that one model lies on.")] = 4,
    chunks: Annotated[
        int | None, typer.Option(help="Stages on every rank, where the schedule leaves it open.")
    ] = None,
    measured: Annotated[
        bool,
        typer.Option(help="Time forward and backward of every layer here; else count products."),
    ] = False,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples, where it is timed; default: 4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the cut as JSON.")] = False,
) -> None:
    """How a recipe's model is cut into stages, beside a cut at the borders of its flow blocks."""
    from parallel.pipeline.catalog import Words, places_of
    from trainer.assembly import model_architecture
    from trainer.pipelines import chain_costs
    from trainer.recipe import load_recipe

    _check_cut(overrides or [], batch, measured)
    words = Words("--schedule", "--stages", "a step's microbatches", "--chunks")
    places = places_of(schedule, stages, 2 * max(stages, 1), chunks, words)
    loaded = load_recipe(recipe, overrides or [])
    architecture = model_architecture(loaded)
    chain, costs = chain_costs(loaded, architecture, (batch or TIMED) if measured else None)
    cuts = {"between layers": _cut(chain, costs, places, None)}
    if len(chain.borders) < len(chain.links):
        cuts["at the borders of flow blocks"] = _cut(chain, costs, places, chain.borders)
    if as_json:
        typer.echo(json.dumps(cuts))
        return
    unit = "measured time" if measured else "matrix products"
    table = Table("cut", "rank", "links", "share of the work", title=f"{recipe}, by {unit}")
    for way, found in cuts.items():
        for rank in found["ranks"]:
            spans = ", ".join(rank["stages"])
            table.add_row(way, str(rank["rank"]), spans, f"{rank['share']:.1%}")
            way = ""
        table.add_section()
    plain().print(table)
    for way, found in cuts.items():
        balance = "too few" if found["balance"] is None else f"{found['balance']:.1%} of the ideal"
        typer.echo(f"Cut {way}: {balance}.")


def _check_cut(overrides: list[str], batch: int | None, measured: bool) -> None:
    """Raises UserError for what would be passed over."""
    if batch is not None and not measured:
        raise UserError(
            f"--batch {batch} says how many samples are timed, and nothing is without --measured; add "
            "--measured, or drop --batch."
        )
    for change in overrides:
        key = change.partition("=")[0]
        if key.partition(".")[0] == "parallel":
            raise UserError(
                f"{key} is not looked at here: --stages, --schedule and --chunks say how the model is cut; "
                "use these."
            )


def _cut(
    chain: "Chain", costs: list[float], places: tuple[int, ...], borders: tuple[int, ...] | None
) -> dict[str, Any]:
    """The best cut at these places; a balance of None and no ranks if there are too few of them."""
    from parallel.pipeline.cut import balance, cut, work_of_ranks

    if borders is not None and len(borders) < len(places):
        return {"balance": None, "ranks": []}
    bounds = cut(costs, places, borders)
    work = work_of_ranks(costs, bounds, places)
    total = sum(work) or 1.0
    names = [link.name for link in chain.links]
    ranks = [
        {
            "rank": rank,
            "share": work[rank] / total,
            "stages": [
                f"{names[begin]} ... {names[end - 1]}" if end - begin > 1 else names[begin]
                for place, (begin, end) in zip(places, pairwise(bounds), strict=True)
                if place == rank
            ],
        }
        for rank in range(len(work))
    ]
    return {"balance": balance(work), "ranks": ranks}


def _check_costs(**costs: float) -> None:
    for name, value in costs.items():
        if not 0 <= value <= DEAREST:
            raise UserError(
                f"--{name} = {value} is no cost; use a number from 0 to {DEAREST:,.0f}."
            )
    if not costs["forward"] or not costs["input"] + costs["weight"]:
        raise UserError("--forward, and --input or --weight, must be above 0.")


def _print(timeline: "Timeline") -> None:
    made = timeline.schedule
    table = Table("rank", "stages", "busy", "idle", "peak activations", title=timeline.title)
    for rank in range(made.ranks):
        held = ", ".join(f"{stage}{'^' if up else ''}" for up, stage in made.local(rank))
        table.add_row(
            str(rank),
            held,
            f"{timeline.busy(rank):g}",
            f"{timeline.idle(rank):.1%}",
            f"{timeline.peak_activations[rank]:g}",
        )
    plain().print(table)
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
