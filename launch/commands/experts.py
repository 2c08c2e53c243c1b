"""`flowmill experts`: which rank should have which experts, and a run's checkpoint with them placed so."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from flows.errors import UserError
from launch.console import plain

if TYPE_CHECKING:
    from trainer.expert_placement import Placing

app = typer.Typer(no_args_is_help=True)

Way = Literal["auto", "exact", "alternating"]


@app.callback()
def experts() -> None:
    """Place experts on ranks by the trace of a run (train.trace_experts)."""


@app.command("place")
def place_command(
    run: Annotated[Path, typer.Argument(help="Run folder with a trace of its routing.")],
    ranks: Annotated[
        int | None, typer.Option(help="Ranks that experts lie on; default: parallel.ep of the run.")
    ] = None,
    method: Annotated[
        Way, typer.Option(help="An integer program, alternating assignment, or by size.")
    ] = "auto",
    limit: Annotated[
        float,
        typer.Option(
            help="Load of a layer's busiest rank over the mean that is allowed where it is reached; inf: any."
        ),
    ] = 1.05,
    since: Annotated[int, typer.Option(min=0, help="Trace after this step alone.")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="For all of it; then the best so far.")
    ] = 30.0,
    write: Annotated[
        Path | None, typer.Option(help="A new run folder, its checkpoint rewritten.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Which checkpoint to rewrite; default: the newest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: one record.")] = False,
) -> None:
    """Fewer tokens that change ranks from layer to layer, on ranks with equal loads: before and after."""
    # torch takes seconds to import: `flowmill --help` should not.
    from trainer.expert_placement import check_write, place_run, write_placed

    if write is not None:
        check_write(run, write, ranks=ranks, step=step)
    elif step is not None:
        raise UserError(
            f"--step {step} says which checkpoint is rewritten, and nothing is without --write; add --write, "
            "or drop --step."
        )
    found = place_run(run, ranks=ranks, method=method, limit=limit, since=since, seconds=seconds)
    written = None if write is None else write_placed(found, write, step)
    if as_json:
        typer.echo(json.dumps(_record(found) | {"written": write and str(write)}))
        return
    _print(found)
    if written is not None:
        placed, needed = written
        plain(soft_wrap=True).print(
            f"{placed.root} has the experts of {run} so; "
            f"flowmill train {placed.recipe} --ranks {needed} goes on in it.",
            highlight=False,
        )


def _print(found: "Placing") -> None:
    before, after = found.before, found.after
    steps = len(found.trace.steps)
    title = f"{found.run.root}: experts on {found.ranks} ranks, by {steps} steps of its trace"
    table = Table("", "before", "after", title=title)
    pairs = max(found.pairs, 1)
    shares = (f"{cost.hops:,} ({cost.hops / pairs:.1%})" for cost in (before, after))
    table.add_row("hops between ranks", *shares)
    table.add_row("max/mean load, worst layer", f"{before.worst:.3f}", f"{after.worst:.3f}")
    for layer, pair in enumerate(zip(before.imbalance, after.imbalance, strict=True)):
        table.add_row(f"  layer {layer}", *(f"{value:.3f}" for value in pair))
    console = plain()
    console.print(table)
    how = {"exact": "an integer program", "alternating": "alternating assignment"}
    best = "; nothing as even has fewer hops" if found.placed.proven else ""
    console.print(
        f"Placed by {how[found.placed.method]} ({found.placed.why}){best}.",
        highlight=False,
        soft_wrap=True,
    )


def _record(found: "Placing") -> dict[str, Any]:
    return {
        "run": str(found.run.root),
        "ranks": found.ranks,
        "steps": len(found.trace.steps),
        "pairs": found.pairs,
        "before": asdict(found.before),
        "after": asdict(found.after),
        "method": found.placed.method,
        "why": found.placed.why,
        "proven": found.placed.proven,
        "places": found.placed.places.tolist(),
    }
