"""`flowmill evaluate`: how good the samples of a run are, in numbers beside their yardsticks."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from launch.commands.sample import RunArgument, SampleOverrides


def evaluate(
    run: RunArgument,
    overrides: SampleOverrides = None,
    count: Annotated[int, typer.Option(min=10, help="Samples to draw.")] = 500,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Class accuracy by a classifier trained on real images; energy distance to held-out ones."""
    from trainer.run_folder import open_run
    from trainer.sampling import with_overrides
    from trainer.verdict import evaluate_run

    folder, recipe = open_run(run)
    recipe = with_overrides(recipe, overrides or [])
    verdict = evaluate_run(folder, recipe, count)
    text = json.dumps(verdict)
    (folder.root / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
        return
    Console(soft_wrap=True).print(_table(verdict))
