"""`flowmill data`: make shards, index them, and look whether they are sound."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.errors import UserError
from launch.commands.sample import check_picture

if TYPE_CHECKING:
    from data_pipeline.verify import Report

app = typer.Typer(help="Pack, index and verify WebDataset shards.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Pattern = Annotated[
    str, typer.Argument(help="Shards: a path or URL with {00..07} or *, or embedded:NAME/...")
]
# A damaged data set can have a problem a sample; the rest is in --json.
SHOWN_PROBLEMS = 20


@app.command()
def pack(
    source: Annotated[
        str, typer.Argument(help="x.npz (arrays images, labels), shards x-*.tar, or sklearn:digits")
    ],
    folder: Annotated[Path, typer.Argument(help="Where train-*.tar and heldout-*.tar go.")],
    per_shard: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 10_000,
    heldout: Annotated[int, typer.Option(min=0, help="Samples kept for evaluation.")] = 0,
    shuffle: Annotated[
        int | None, typer.Option(min=0, help="Shuffle all samples first, by this seed.")
    ] = None,
    label_field: Annotated[
        str | None, typer.Option(help="Field of each sample's .json that holds its class.")
    ] = None,
    caption_field: Annotated[
        str | None, typer.Option(help="Field of each sample's .json that holds its caption.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write images into shards; the same source gives the same bytes."""
    from data_pipeline import pack as packer

    samples = packer.open_source(source, label_field=label_field, caption_field=caption_field)
    try:
        written = packer.pack(
            samples, folder, per_shard=per_shard, heldout=heldout, shuffle=shuffle
        )
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: shards cannot be written there ({error.strerror}); give a "
            "folder with room, or a path where one can be made."
        ) from error
    if as_json:
        _print_json([asdict(shard) | {"path": str(shard.path)} for shard in written])
        return
    table = Table("shard", "samples", "MB", title=f"{source} in {len(written)} shards")
    for shard in written:
        table.add_row(str(shard.path), f"{shard.samples:,}", f"{shard.bytes / 1e6:.1f}")
    Console().print(table)


@app.command()
def index(pattern: Pattern, as_json: Json = False) -> None:
    """Store where every sample lies, beside each shard, so that no run has to look for itself."""
    from data_pipeline.index import write_index
    from data_pipeline.shards import expand

    places = {url: write_index(url) for url in expand(pattern)}
    if as_json:
        _print_json(places)
        return
    table = Table("shard", "index", title=f"{len(places)} indexes")
    for url, place in places.items():
        table.add_row(url, place)
    Console().print(table)


@app.command()
def verify(
    pattern: Pattern,
    classes: Annotated[
        int | None, typer.Option(min=1, help="Labels have to be below this.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a grid of samples to this .png file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Decode every sample; exit code 1 if anything is wrong with any."""
    from data_pipeline import verify as verifier

    if picture is not None:
        check_picture("--picture", picture)
    report = verifier.verify(pattern, classes=classes)
    if as_json:
        _print_json(vars(report))
    else:
        _print_report(pattern, report)
    if picture is not None and not report.problems:
        verifier.draw_grid(pattern, picture)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def order(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to it, as section.key=value.")
    ] = None,
    start: Annotated[int, typer.Option("--from", min=0, help="Samples taken before.")] = 0,
    batches: Annotated[int, typer.Option(min=1, help="Global batches to list.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that read different samples.")] = 1,
    as_json: Json = False,
) -> None:
    """Which samples each global batch holds, and which rank reads them; nothing is decoded."""
    from data_pipeline.loader import list_shares
    from trainer.assembly import training_stream
    from trainer.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    batch = loaded.train.batch
    if batch % ranks:
        raise UserError(
            f"train.batch = {batch} does not divide over --ranks {ranks}; give a divisor of it."
        )
    stream = training_stream(loaded)
    listed = list_shares(stream, start=start, batches=batches, batch=batch, ranks=ranks)
    stream.close()
    if as_json:
        _print_json([asdict(one) for one in listed])
        return
    table = Table("position", "rank", "samples", title=f"{recipe}: batches of {batch}")
    for one in listed:
        for rank, keys in enumerate(one.ranks):
            table.add_row("" if rank else f"{one.position:,}", str(rank), Text(" ".join(keys)))
        table.add_section()
    Console().print(table)


def _print_report(pattern: str, report: "Report") -> None:
    console = Console()
    table = Table("what", "value", title=pattern)
    table.add_row("shards", f"{report.shards:,}")
    table.add_row("samples", f"{report.samples:,}")
    table.add_row("image bytes", f"{report.bytes:,}")
    for size, count in report.sizes.most_common():
        table.add_row(f"images {size}", f"{count:,}")
    for label, count in sorted(report.labels.items()):
        table.add_row(f"class {label}", f"{count:,}")
    table.add_row("problems", f"{len(report.problems):,}")
    console.print(table)
    for problem in report.problems[:SHOWN_PROBLEMS]:
        console.print(problem, style="red", markup=False, highlight=False)
    if len(report.problems) > SHOWN_PROBLEMS:
        console.print(
            f"... and {len(report.problems) - SHOWN_PROBLEMS} more; --json lists them all"
        )


def _print_json(value: object) -> None:
    Console().print_json(json.dumps(value))
