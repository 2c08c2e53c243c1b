"""`flowmill`: one command line, one place where errors become sentences."""

import os
import sys
from importlib.metadata import entry_points
from typing import Annotated, Any

import click
import typer
from rich.console import Console

from flows.errors import UserError
from launch.commands import checkpoint, data, doctor, evaluate, sample, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train flow transformers: one recipe, any number of ranks, the same mathematics.",
)
app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(data.app, name="data", help="Pack, index and verify shards.")
app.add_typer(checkpoint.app, name="checkpoint", help="List and verify checkpoints.")
app.command("doctor")(doctor.doctor)
for command in entry_points(group="flowmill.commands"):
    app.add_typer(command.load(), name=command.name)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["FLOWMILL_DEBUG"] = "1"


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; a UserError is printed as its sentence and exits with code 2."""
    try:
        return app(arguments, standalone_mode=False)
    except UserError as error:
        if os.environ.get("FLOWMILL_DEBUG") == "1":
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
