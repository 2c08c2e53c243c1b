"""Arguments, options and starts of ranks that commands of `flowmill bench` share."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it, as section.key=value.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def run_as_ranks(count: int) -> None:
    """Run this very command line as `count` ranks and exit as they do; in one of them, return at once."""
    from launch.ranks import joined_by_launcher, run_ranks

    if not joined_by_launcher():
        with tempfile.TemporaryDirectory() as logs:
            sys.exit(run_ranks(sys.argv[1:], count, Path(logs)))
