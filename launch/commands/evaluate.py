"""`flowmill evaluate`: how good the samples of a run are, in numbers beside their yardsticks."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.errors import UserError
from launch.commands.sample import (
    BatchOption,
    RunArgument,
    SampleOverrides,
    how_drawn,
    how_in_words,
    reporter,
)
from launch.console import plain
from launch.joined import RanksOption, joined, start_ranks

if TYPE_CHECKING:
    from trainer.evaluation import Evaluation


def evaluate(
    run: RunArgument,
    overrides: SampleOverrides = None,
    count: Annotated[int, typer.Option(min=10, help="Samples to draw.")] = 500,
    batch: BatchOption = 32,
    features: Annotated[
        Path | None,
        typer.Option(
            help="Local weights to measure by too: Inception v3, or a DINOv2, ViT or CLIP."
        ),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Held-out images whose likelihood a flow-matching model is asked for.",
        ),
    ] = None,
    ranks: RanksOption = None,
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
    _check_place(folder.evaluation)
    recipe = with_overrides(recipe, overrides or [])
    start_ranks(folder, ranks)
    with joined() as here:
        judged = judge_run(
            folder,
            recipe,
            count,
            batch=batch,
            ranks=here,
            report=reporter(here.rank, "held-out samples whose likelihood is found"),
            features=features,
            solved=bits,
        )
    if judged is None:
        return  # the first rank speaks for all
    samples, found = judged
    step, calls = samples.step, samples.mean_calls
    text = json.dumps({**how_drawn(recipe, step, calls), **found.to_dict()}, allow_nan=False)
    folder.evaluation.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
        return
    _print(f"{run}, step {step}, {count} samples ({how_in_words(recipe)})", calls, found)


def _check_place(path: Path) -> None:
    """Raises UserError unless the file can be written, before anything is drawn."""
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise UserError(f"{path} cannot be written; move it away.")


def _print(title: str, calls: float, found: "Evaluation") -> None:
    table = Table("samples", "found", "beside", title=title)
    table.add_row("network calls a sample", f"{calls:g}", "")
    for row in found.rows():
        table.add_row(*row)
    plain().print(table)
