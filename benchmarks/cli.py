"""`flowmill bench`: measurements anyone can repeat, as a table or as JSON."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Measure this machine and this trainer.")


@app.callback()
def bench() -> None:
    """Measure this machine and this trainer."""


@app.command()
def overhead(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of a shipped one.")
    ] = "digits",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as section.key=value.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=10, help="Steps of either side.")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
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
    Console().print(table)
