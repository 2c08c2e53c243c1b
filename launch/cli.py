"""`flowmill`: one command line, and the one place where errors become sentences."""

import sys
import traceback
from importlib.metadata import entry_points

import typer
from rich.console import Console

from flows.errors import UserError
from launch.commands import (
    checkpoint,
    data,
    demo,
    doctor,
    evaluate,
    experts,
    pipeline,
    sample,
    train,
)
from launch.ranks import LOST_OTHERS, LostOthers, started_by_flowmill

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train flow transformers: one recipe, any number of ranks, the same mathematics. "
    "`--debug` anywhere shows the traceback of an error.",
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(data.app, name="data", help="Pack, index and verify shards.")
app.add_typer(
    checkpoint.app, name="checkpoint", help="List, verify, inspect and compare checkpoints."
)
app.add_typer(experts.app, name="experts", help="Place experts on ranks.")
app.add_typer(pipeline.app, name="pipeline", help="Show pipeline schedules.")
app.command("doctor")(doctor.doctor)
for command in entry_points(group="flowmill.commands"):
    app.add_typer(command.load(), name=command.name)


def main() -> None:
    """Run the command line; a UserError is printed as its sentence and ends with exit code 2."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except UserError as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, LostOthers) and started_by_flowmill():
            sys.exit(LOST_OTHERS)  # the parent tells of the rank that ended first, and why
        _say(error)
        sys.exit(2)


def _say(error: UserError) -> None:
    """Each of its sentences on a line of its own."""
    console = Console(stderr=True, soft_wrap=True)
    for line in str(error).splitlines():
        sentence = line if line.endswith((".", "?")) else f"{line}."
        console.print(f"error: {sentence}", style="bold red", highlight=False, markup=False)
