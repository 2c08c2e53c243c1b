"""`flowmill sample`: pictures from a trained run, in one sheet, in files, or in shards."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from flows.errors import UserError
from launch.console import plain
from launch.joined import RanksOption, joined, start_ranks

if TYPE_CHECKING:
    from parallel.processes import Ranks
    from trainer.recipe import Recipe
    from trainer.run_folder import RunFolder
    from trainer.sample_output import Order
    from trainer.trained import Trained

SECONDS_BETWEEN_LINES = 10.0
SHOWN_BROKEN = 20  # samples named in a line

RunArgument = Annotated[str, typer.Argument(help="The folder of a run.")]
SampleOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes: sample.key=value, seed=value, data.heldout=shards, or where "
        "data.autoencoder or data.text.encoder is now."
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", help="A text to draw samples of; several are taken in turn. As sample.prompts."
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        min=1, help="Samples to draw, classes or prompts in turn; 100, or 10 of each prompt."
    ),
]
BatchOption = Annotated[
    int,
    typer.Option(
        "--batch",
        min=1,
        help="Samples in one network call; rounding depends on it and, where sample.strategy solves for "
        "tokens in parallel, what lies within sample.tolerance, for a batch settles as a whole.",
    ),
]
Form = Annotated[
    Literal["grid", "folder", "shards"],
    typer.Option(help="One picture; a file for each sample; or WebDataset shards."),
]
Out = Annotated[
    str | None,
    typer.Option(
        help="The picture, folder or URL; default RUN/samples/ with final.png, folder or shards."
    ),
]


def sample(
    run: RunArgument,
    overrides: SampleOverrides = None,
    prompt: Prompts = None,
    count: Count = None,
    form: Form = "grid",
    out: Out = None,
    numbers: Annotated[
        bool,
        typer.Option("--numbers", help="Store what the model makes as .npy, in place of PNGs."),
    ] = False,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = 1000,
    batch: BatchOption = 32,
    optimise_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Choose this many time steps by their error, and draw with them."),
    ] = None,
    ranks: RanksOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Draw samples from the averaged weights of the newest whole checkpoint.

    Sample number i is the same on any number of ranks. A folder or shards that were cut short are
    completed by the same command; with sample.strategy=auto, which goes by this machine's clock, the
    rest may differ within sample.accuracy from what it would have been.
    """
    from trainer.prompts import embed_prompts
    from trainer.run_folder import open_run
    from trainer.sample_output import Order
    from trainer.sampling import with_overrides
    from trainer.storage import reach_storage
    from trainer.trained import load_trained

    folder, recipe = open_run(run)
    _check_twice(overrides or [], prompt, optimise_steps)
    asked = [f"sample.prompts={json.dumps(prompt, ensure_ascii=False)}"] if prompt else []
    recipe = with_overrides(recipe, [*(overrides or []), *asked])
    if recipe.sample.prompts:
        embed_prompts(recipe, recipe.sample.prompts)  # refused before ranks start
    count = count or 10 * len(recipe.sample.prompts or range(10))
    place = (out or str(folder.samples / {"grid": "final.png"}.get(form, form))).rstrip("/")
    reach_storage(recipe)
    _check_place(form, place, numbers)
    start_ranks(folder, ranks)
    with joined() as here:
        trained = load_trained(folder, recipe, here.device, batch=min(batch, count))
        if optimise_steps is not None:
            trained = _with_chosen_times(trained, optimise_steps, batch)
        if form == "grid":
            result = _draw_picture(trained, place, count, batch, here)
        else:
            member: Literal["png", "npy"] = "npy" if numbers else "png"
            result = _write_files(
                trained, Order(place, form, member, count, per_shard, batch), here
            )
    if result is None:
        return  # the first rank speaks for all
    if form == "grid" and out is None:
        _send(folder, trained.recipe, Path(place))
    _print(trained, count, place, result, as_json)


def _check_twice(
    overrides: list[str], prompt: list[str] | None, optimise_steps: int | None
) -> None:
    """Raises UserError for what an option and an override say differently."""
    for option, given, key in (
        ("--prompt", prompt, "sample.prompts"),
        ("--optimise-steps", optimise_steps, "sample.times"),
    ):
        if given is not None and any(change.startswith(f"{key}=") for change in overrides):
            raise UserError(f"{option} sets {key}, which is given, too; leave one of them out.")


def _check_place(form: str, place: str, numbers: bool) -> None:
    """Raises UserError, before anything takes long, where nothing could be written."""
    from data_pipeline.storage import resolve

    if form != "grid":
        if resolve(place).local:
            _check_folder(Path(resolve(place).path))
    elif numbers:
        raise UserError("--numbers make no picture; give --form folder or --form shards, too.")
    else:
        check_picture("--out", Path(place))


def _with_chosen_times(trained: "Trained", steps: int, batch: int) -> "Trained":
    """Its sampling at so many times, chosen by the first rank."""
    from parallel.processes import from_first
    from trainer.recipe import override_recipe
    from trainer.step_choice import choose_times

    report = reporter(0, "trajectories that tell which times to take")
    times = from_first(lambda: choose_times(trained, steps, batch=batch, report=report))
    return replace(trained, recipe=override_recipe(trained.recipe, [f"sample.times={times}"]))


def _draw_picture(
    trained: "Trained", place: str, count: int, batch: int, here: "Ranks"
) -> dict[str, Any] | None:
    from trainer import pictures
    from trainer.asked import asked_names
    from trainer.drawing import broken_rows
    from trainer.reporting import GRID_COLUMNS
    from trainer.trained import draw_together

    drawn = draw_together(trained, count, batch=batch, ranks=here)
    if drawn is None:
        return None
    names = asked_names(trained.recipe)
    pictures.class_grid(drawn.images, drawn.labels, names, Path(place), GRID_COLUMNS)
    broken = broken_rows(drawn.images)
    return {"picture": place, "not_finite": broken, "network_calls": drawn.mean_calls}


def _write_files(trained: "Trained", order: "Order", here: "Ranks") -> dict[str, Any] | None:
    from trainer.sample_output import write_samples

    written = write_samples(trained, order, here, reporter(here.rank, "parts"))
    if written is None:
        return None
    facts = {"folder": order.out, "made": written.made, "kept": written.kept}
    return facts | {"not_finite": written.broken, "network_calls": written.network_calls}


def reporter(rank: int, what: str) -> Callable[[int, int], None]:
    """Tells of a rank's progress on stderr, now and then: stdout is for the result.

    what: is counted
    """
    console, last = plain(stderr=True, soft_wrap=True), time.monotonic()

    def report(done: int, of: int) -> None:
        nonlocal last
        if done == of or time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            console.print(f"rank {rank}: {done} of {of} {what}", highlight=False)

    return report


def _send(folder: "RunFolder", recipe: "Recipe", picture: Path) -> None:
    """The picture, to MLflow."""
    from trainer.reporting import add_artifact

    add_artifact(folder, recipe, picture, "samples", plain(stderr=True, soft_wrap=True).print)


def _print(
    trained: "Trained", count: int, place: str, result: dict[str, Any], as_json: bool
) -> None:
    recipe = trained.recipe
    calls = result.pop("network_calls")
    if as_json:
        facts = how_drawn(recipe, trained.step, calls)
        typer.echo(json.dumps({**result, "samples": count, **facts}))
        return
    cost = f" at {calls:g} network calls each" if calls is not None else ""
    kept = f", {result['kept']} of them there already" if result.get("kept") else ""
    plain(soft_wrap=True).print(
        f"{count} samples of step {trained.step} ({how_in_words(recipe)}){cost}{kept}: {place}",
        highlight=False,
    )
    if broken := result["not_finite"]:
        listed = ", ".join(map(str, broken[:SHOWN_BROKEN]))
        rest = f" and {len(broken) - SHOWN_BROKEN} more" if len(broken) > SHOWN_BROKEN else ""
        plain(stderr=True, soft_wrap=True).print(
            f"not finite, and black as pictures: {len(broken)} of {count} samples, number {listed}{rest}; "
            f"leave them out, or {recipe.sample.remedy}",
            highlight=False,
        )


def how_drawn(recipe: "Recipe", step: int | None, network_calls: float | None) -> dict[str, object]:
    """All that decides the samples of a run, for programs."""
    section = recipe.sample.model_dump(mode="json", exclude={"every", "count"})
    return {"step": step, "seed": recipe.seed, "sample": section, "network_calls": network_calls}


def how_in_words(recipe: "Recipe") -> str:
    """The same for people, as far as one line holds it."""
    return f"{recipe.sample.in_words()}, seed {recipe.seed}"


def check_picture(option: str, path: Path, suffix: str = ".png") -> None:
    """Raises UserError, before anything takes long, where no such picture could be written."""
    if path.suffix.lower() != suffix or path.is_dir():
        raise UserError(f"{option} {path} is not the name of a {suffix} file; give one.")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}; make it first.")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise UserError(f"{option} {path} cannot be written; check permissions, or give another.")


def _check_folder(path: Path) -> None:
    """Raises UserError, before anything takes long, where no folder could be written."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        raise UserError(f"--out {path} cannot be a folder, for {existing} is a file; give another.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be written; check permissions, or give another.")
