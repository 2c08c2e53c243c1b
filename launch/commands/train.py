"""`flowmill train`: check everything, then start or join the ranks."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from flows.errors import UserError
from launch.console import plain
from launch.progress import ProgressLine
from launch.ranks import (
    INTERRUPTED,
    STOPPED,
    as_rank,
    die_with_parent,
    joined_by_launcher,
    run_ranks,
    started_by_flowmill,
    world_size_from_launcher,
)

if TYPE_CHECKING:
    from trainer.dry_run import Check
    from trainer.recipe import Recipe


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as section.key=value.")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Local ranks to start.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: as JSON.")] = False,
) -> None:
    """Train a recipe; in a run folder that holds a checkpoint, go on from it.

    Under torchrun it joins the ranks that are there; otherwise it starts --ranks of its own. Exit code 75
    where a signal stopped it: a checkpoint is there, and the same command goes on.
    """
    # The models say what a recipe may hold, and torch takes seconds to import: `--help` should not wait.
    from parallel.processes import choose_device
    from trainer.assembly import in_steps, training_stream
    from trainer.dry_run import check
    from trainer.recipe import load_recipe
    from trainer.running import run_training

    loaded = load_recipe(recipe, overrides or [])
    joined = joined_by_launcher()
    world_size = world_size_from_launcher() if joined else ranks or 1
    if joined and ranks is not None and ranks != world_size:
        raise UserError(
            f"--ranks {ranks} contradicts the launcher, which started {world_size}; leave it out."
        )
    _warn_of_name(loaded)
    if dry_run:
        _print_checks(check(loaded, world_size), as_json)
    elif joined or world_size == 1:
        die_with_parent()
        # One process of a run looks at its folder: they would take each other for another run.
        first = os.environ.get("RANK", "0") == "0"
        check(loaded, world_size, place=first)
        if not loaded.train.steps:
            loaded = in_steps(loaded, training_stream(loaded).epochs)
        try:
            with as_rank(), ProgressLine(loaded.train.steps, loaded.train.log_every) as progress:
                outcome = run_training(loaded, world_size, progress)
        except KeyboardInterrupt:
            if first:
                sys.stderr.write("interrupted; nothing was saved since the last checkpoint\n")
            sys.exit(INTERRUPTED)
        if first and not outcome.finished:
            # Rank 0 alone: a launcher ends the others at the first that fails, and it is the last to end.
            sys.exit(STOPPED)
    else:
        check(loaded, world_size)
        choose_device("auto", world_size - 1)  # refuses more ranks than there are accelerators
        sys.exit(run_ranks(sys.argv[1:], world_size, Path(loaded.run.dir) / "logs"))


def _warn_of_name(recipe: "Recipe") -> None:
    """A published name whose sizes the recipe changes is not the model that it names."""
    changed = recipe.model.changed_of_name()
    if changed and not started_by_flowmill() and os.environ.get("RANK", "0") == "0":
        plain(stderr=True, soft_wrap=True).print(f"warning: {changed}", highlight=False)


def _print_checks(checks: "Sequence[Check]", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks]))
        return
    table = Table("checked", "found", title="ready to train; nothing was started")
    for check in checks:
        table.add_row(check.what, check.found)
    plain().print(table)
