"""`flowmill data`: make shards, index them, and look whether they are sound."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from flows.errors import UserError
from launch.commands.autoencoder import autoencoder
from launch.commands.encode import encode
from launch.commands.sample import check_picture
from launch.console import plain

if TYPE_CHECKING:
    from data_pipeline.verify import Report

app = typer.Typer(help="Pack, index, encode and verify WebDataset shards.", no_args_is_help=True)
app.command()(autoencoder)
app.command()(encode)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
Pattern = Annotated[
    str, typer.Argument(help="Shards: a path or URL with {00..07} or *, or embedded:NAME/...")
]
# A damaged data set can have a problem a sample; the rest is in --json.
SHOWN_PROBLEMS = 20
SHOWN_SIZES = 12
# A listing is in memory before it is shown: some hundred bytes a sample.
MOST_LISTED = 1_000_000
BAR = 24  # characters of the longest bar of a histogram


@app.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of class folders, a table (.csv, .jsonl, .parquet), x.npz (arrays images, "
            "labels), shards x-*.tar, or sklearn:digits."
        ),
    ],
    folder: Annotated[
        str, typer.Argument(help="Folder or URL where train-*.tar and heldout-*.tar go.")
    ],
    per_shard: Annotated[int, typer.Option(min=1, help="Samples a shard.")] = 10_000,
    heldout: Annotated[int, typer.Option(min=0, help="Samples kept for evaluation.")] = 0,
    shuffle: Annotated[
        int | None,
        typer.Option(min=0, max=2**63 - 1, help="Shuffle all samples first, by this seed."),
    ] = None,
    label_field: Annotated[
        str | None,
        typer.Option(help="Column of the table, or field of each sample's .json, with its class."),
    ] = None,
    caption_field: Annotated[
        str | None,
        typer.Option(
            help="Column of the table, or field of each sample's .json, with its caption."
        ),
    ] = None,
    image_field: Annotated[
        str, typer.Option(help="Column of a table with image bytes or paths.")
    ] = "image",
    as_json: Json = False,
) -> None:
    """Write images into shards; the same source gives the same bytes."""
    from data_pipeline import pack as packer
    from trainer.storage import reach_plain_storage

    reach_plain_storage()
    samples = packer.open_source(
        source, label_field=label_field, caption_field=caption_field, image_field=image_field
    )
    written = packer.pack(samples, folder, per_shard=per_shard, heldout=heldout, shuffle=shuffle)
    if as_json:
        _print_json([asdict(shard) for shard in written])
        return
    table = Table("shard", "samples", "MB", title=f"{source} in {len(written)} shards")
    for shard in written:
        table.add_row(shard.path, f"{shard.samples:,}", f"{shard.bytes / 1e6:.1f}")
    plain().print(table)


@app.command()
def index(pattern: Pattern, as_json: Json = False) -> None:
    """Store where every sample lies, in one file beside the shards, so that no run has to look for itself.

    Only new and changed shards are read. Exit code 1 if some could not be indexed.
    """
    from data_pipeline.indexes import update_catalogs
    from trainer.storage import reach_plain_storage

    reach_plain_storage()
    updated = update_catalogs(pattern)
    if as_json:
        _print_json(asdict(updated))
    else:
        table = Table("what", "value", title=pattern)
        for file in updated.files:
            table.add_row("index", file)
        table.add_row("shards indexed now", f"{updated.made:,}")
        table.add_row("indexed already", f"{updated.kept:,}")
        table.add_row("problems", f"{len(updated.problems):,}")
        plain().print(table)
        _print_problems(updated.problems)
    if updated.problems:
        raise typer.Exit(1)


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
    from trainer.storage import reach_plain_storage

    if picture is not None:
        check_picture("--picture", picture)
    reach_plain_storage()
    report = verifier.verify(pattern, classes=classes)
    if as_json:
        _print_json(report.to_dict())
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
    start: Annotated[
        int, typer.Option("--from", min=0, max=2**53, help="Samples taken before.")
    ] = 0,
    batches: Annotated[int, typer.Option(min=1, help="Global batches to list.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that read different samples.")] = 1,
    as_json: Json = False,
) -> None:
    """Which samples each global batch holds, and which rank reads them; nothing is decoded."""
    from data_pipeline.headers import printable
    from data_pipeline.share import list_shares
    from trainer.assembly import training_stream
    from trainer.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    batch = loaded.train.batch
    if batch % ranks:
        raise UserError(
            f"train.batch = {batch} does not divide over --ranks {ranks}; give a divisor of it."
        )
    if batches * batch > MOST_LISTED:
        raise UserError(
            f"--batches {batches} of train.batch = {batch} are {batches * batch:,} samples, and at most "
            f"{MOST_LISTED:,} are listed at once; ask for fewer, and for the rest by --from."
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
            table.add_row(
                "" if rank else f"{one.position:,}", str(rank), Text(" ".join(map(printable, keys)))
            )
        table.add_section()
    plain().print(table)


def _print_report(pattern: str, report: "Report") -> None:
    console = plain()
    table = Table("what", "value", title=pattern)
    table.add_row("shards", f"{report.shards:,}")
    table.add_row("checksums as in dataset.json", f"{report.checksums:,}")
    table.add_row("samples", f"{report.samples:,}")
    table.add_row("captions", f"{report.captions:,}")
    table.add_row("image bytes", f"{report.bytes:,}")
    for size, count in report.sizes.most_common(SHOWN_SIZES):
        table.add_row(f"images {size}", f"{count:,}")
    if len(report.sizes) > SHOWN_SIZES:
        table.add_row("images of other sizes", f"{len(report.sizes) - SHOWN_SIZES:,} sizes")
    most = max(report.shorter_sides.values(), default=1)
    for side, count in sorted(report.shorter_sides.items()):
        bar = "█" * -(-BAR * count // most)
        table.add_row(f"shorter side {side} to {2 * side - 1}", f"{bar} {count:,}")
    for name, moments in report.moments.items():
        for what, values in (("mean", moments.mean), ("deviation", moments.std)):
            table.add_row(f"{name} {what}", " ".join(f"{value:.4g}" for value in values))
    for label, count in sorted(report.labels.items()):
        table.add_row(f"class {label}", f"{count:,}")
    table.add_row("problems", f"{len(report.problems):,}")
    console.print(table)
    _print_problems(report.problems)


def _print_problems(problems: list[str]) -> None:
    console = plain()
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(problem, style="red", highlight=False)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"... and {len(problems) - SHOWN_PROBLEMS} more; --json lists them all")


def _print_json(value: object) -> None:
    plain().print_json(json.dumps(value))
