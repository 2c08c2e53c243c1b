"""`flowmill checkpoint`: what checkpoints a run has, and whether they are whole."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.errors import UserError
from trainer.checkpoints.commit import committed
from trainer.checkpoints.manifest import MANIFEST

if TYPE_CHECKING:
    from trainer.checkpoints.store import Checkpoint

app = typer.Typer(no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="For programs: a list of records.")]


@app.command("list")
def list_command(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: Json = False,
) -> None:
    """List the checkpoints of a run; checks manifests and file sizes, not contents."""
    # torch takes seconds to import: `flowmill --help` should not.
    from trainer.checkpoints.store import list_checkpoints

    _report(list_checkpoints(_checkpoints_folder(run)), as_json)


@app.command("verify")
def verify(
    target: Annotated[Path, typer.Argument(help="Run folder, or one checkpoint in it.")],
    as_json: Json = False,
) -> None:
    """Read every byte of a run's checkpoints, or of one, and compare checksums."""
    from trainer.checkpoints.store import inspect, list_checkpoints

    if not target.name.startswith("step-") and not (target / MANIFEST).is_file():
        _report(list_checkpoints(_checkpoints_folder(target), checksums=True), as_json)
    else:
        _report([inspect(target, checksums=True)], as_json)


def _checkpoints_folder(run: Path) -> Path:
    """Where the checkpoints of `run` are; `run` may be that folder itself."""
    for folder in (run / "checkpoints", run):
        if committed(folder):
            return folder
    if (run / "recipe.yaml").is_file():
        raise UserError(f"{run} has no checkpoints yet; train it first.")
    state = "not a run folder" if run.exists() else "no such folder"
    raise UserError(f"{run}: {state}; name the run.dir of a training.")


def _report(checkpoints: "list[Checkpoint]", as_json: bool) -> None:
    """Print `checkpoints`; exit code 1 where one is damaged."""
    if as_json:
        typer.echo(json.dumps([_record(checkpoint) for checkpoint in checkpoints], indent=2))
    else:
        parent = checkpoints[0].path.parent
        table = Table("step", "size", "state", "folder", title=escape(str(parent)))
        for checkpoint in checkpoints:
            state = "[green]whole"
            if checkpoint.damage is not None:
                state = f"[red]{escape(checkpoint.damage)}"
            size = f"{checkpoint.size / 2**20:.1f} MiB"
            table.add_row(str(checkpoint.step), size, state, checkpoint.path.name)
        Console().print(table)
    if any(checkpoint.damage for checkpoint in checkpoints):
        raise typer.Exit(1)


def _record(checkpoint: "Checkpoint") -> dict[str, object]:
    return {
        "step": checkpoint.step,
        "path": str(checkpoint.path),
        "size": checkpoint.size,
        "whole": checkpoint.damage is None,
        "damage": checkpoint.damage,
    }
