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
    """Class accuracy by a classifier of real images; energy distance to held-out real images.

    Kept as RUN/evaluation.json, too.
    """
    from trainer.judging import judge_run
    from trainer.run_folder import check_writable, open_run
    from trainer.sampling import with_overrides

    folder, recipe = open_run(run)
    check_writable(folder)
    samples, found = judge_run(folder, with_overrides(recipe, overrides or []), count)
    verdict = {"network_calls": samples.network_calls, **found.to_dict()}
    text = json.dumps(verdict)
    folder.evaluation.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
        return
    table = Table("samples", "found", "beside", title=f"{run}, {count} samples")
    table.add_row("network calls a sample", str(samples.network_calls), "")
    for row in found.rows():
        table.add_row(*row)
    Console().print(table)
