"""`flowmill doctor`: what this machine can do, in one table."""

import json
from typing import Annotated

import typer
from rich.console import Console


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """What this machine can do, and what is missing for what.

    Exit code 1 if something is missing that no training can do without.
    """
    from launch.doctor import examine, healthy, to_dict, to_table

    findings = examine()
    if as_json:
        typer.echo(json.dumps(to_dict(findings), indent=2))
    else:
        Console().print(to_table(findings))
    if not healthy(findings):
        raise typer.Exit(1)
