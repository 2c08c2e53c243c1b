"""Arguments and options that commands of `flowmill bench` share."""

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it, as section.key=value.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
