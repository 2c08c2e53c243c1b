"""`flowmill sample`: pictures from a trained run."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.errors import UserError

if TYPE_CHECKING:
    from trainer.drawing import Samples
    from trainer.recipe import Recipe

RunArgument = Annotated[str, typer.Argument(help="The folder of a run.")]
SampleOverrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes: sample.key=value, seed=value or data.heldout=shards."),
]


def sample(
    run: RunArgument,
    overrides: SampleOverrides = None,
    count: Annotated[int, typer.Option(min=1, help="Samples to draw, classes in turn.")] = 100,
    out: Annotated[
        Path | None, typer.Option(help="The PNG; default RUN/samples/final.png.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw samples from the averaged weights of the newest whole checkpoint into one picture."""
    from trainer import pictures
    from trainer.reporting import GRID_COLUMNS, add_artifact
    from trainer.run_folder import open_run
    from trainer.sampling import sample_checkpoint, with_overrides

    folder, recipe = open_run(run)
    recipe = with_overrides(recipe, overrides or [])
    path = out or folder.samples / "final.png"
    check_picture("--out", path)
    drawn = sample_checkpoint(folder, recipe, count)
    pictures.class_grid(drawn.images, drawn.labels, recipe.data.names, path, GRID_COLUMNS)
    if out is None:
        note = Console(stderr=True, soft_wrap=True).print
        add_artifact(folder, recipe, path, "samples", lambda text: note(text, markup=False))
    result = {"picture": str(path), "samples": count, **how_drawn(recipe, drawn)}
    if as_json:
        typer.echo(json.dumps(result))
        return
    Console(soft_wrap=True).print(
        f"{count} samples of step {drawn.step} ({how_in_words(recipe)}) at {drawn.mean_calls:g} "
        f"network calls each: {path}",
        highlight=False,
    )


def how_drawn(recipe: "Recipe", drawn: "Samples") -> dict[str, object]:
    """All that decides the samples of a run, for programs."""
    section = recipe.sample.model_dump(mode="json", exclude={"every", "count"})
    calls = drawn.mean_calls
    return {"step": drawn.step, "seed": recipe.seed, "sample": section, "network_calls": calls}


def how_in_words(recipe: "Recipe") -> str:
    """The same for people, as far as one line holds it."""
    return f"{recipe.sample.in_words()}, seed {recipe.seed}"


def check_picture(option: str, path: Path) -> None:
    """Raises UserError, before anything takes long, where no PNG could be written."""
    if path.suffix.lower() != ".png" or path.is_dir():
        raise UserError(f"{option} {path} is not the name of a .png file; give one.")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it first.")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written; check permissions, or give another.")
