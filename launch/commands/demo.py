"""`flowmill demo`: the whole mission in small, with the very commands a user would type."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flows.errors import UserError
from trainer.checkpoints.commit import committed
from trainer.metrics_log import read

console = Console(soft_wrap=True)


def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the digits recipe, section.key=value.")
    ] = None,
    folder: Annotated[str, typer.Option(help="Where everything goes.")] = "runs/demo",
    ranks: Annotated[int, typer.Option(min=1, help="Local ranks to train on.")] = 2,
) -> None:
    """Pack real digits, train on two ranks, kill it, resume, sample, evaluate, show the pictures."""
    begin = time.monotonic()
    root = _fresh(Path(folder))
    shards, run = root / "shards", root / "digits"
    train = [
        "train", "digits", f"run.dir={run}", f"data.train={shards}/train-*.tar",
        *(overrides or []), "--ranks", str(ranks),
    ]  # fmt: skip
    from trainer.recipe import load_recipe

    recipe = load_recipe("digits", train[2:-2])  # refuses wrong changes before anything is made
    _flowmill(
        "data", "pack", "embedded:digits28/train-{000000..000003}.tar", str(shards),
        "--per-shard", "1500",
    )  # fmt: skip
    _flowmill("data", "verify", str(shards / "train-*.tar"))
    _train_and_kill(train, run, kill_after=recipe.checkpoint.every + recipe.checkpoint.every // 2)
    _flowmill(*train)
    _flowmill("sample", str(run), "--count", "100")
    _flowmill("evaluate", str(run))
    console.rule("done")
    minutes = (time.monotonic() - begin) / 60
    console.print(
        f"{minutes:.1f} minutes\n"
        f"samples by class   {run}/samples/final.png\n"
        f"samples over time  {run}/samples/training.png\n"
        f"loss curve         {run}/loss.png\n"
        f"checkpoint         {_newest(run / 'checkpoints')}\n"
        f"MLflow page        {_mlflow_command(root)}\n"
        "                   then open http://127.0.0.1:5000",
        highlight=False,
        markup=False,
    )


def _train_and_kill(arguments: list[str], run: Path, kill_after: int) -> None:
    """Train until step `kill_after` is on record, then SIGKILL every rank at once."""
    _show(arguments)
    process = subprocess.Popen([sys.executable, "-m", "launch", *arguments], start_new_session=True)
    try:
        while process.poll() is None and _last_step(run) < kill_after:
            time.sleep(0.2)
        if process.poll() is not None:
            raise UserError(
                f"the training ended with exit code {process.returncode} before it could be killed "
                f"at step {kill_after}; see what it printed above."
            )
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    console.print(
        f"[bold]Killed every rank with SIGKILL after step {_last_step(run)}, on purpose.[/] "
        "The same command goes on from the last checkpoint:",
        highlight=False,
    )


def _flowmill(*arguments: str) -> None:
    """Run one command of this command line. Raises UserError if it fails."""
    _show(arguments)
    code = subprocess.run([sys.executable, "-m", "launch", *arguments], check=False).returncode
    if code:
        raise UserError(f"`flowmill {arguments[0]}` ended with exit code {code}; see above.")


def _show(arguments: tuple[str, ...] | list[str]) -> None:
    console.print(f"\n[bold cyan]$ flowmill {escape(shlex.join(arguments))}[/]", highlight=False)


def _last_step(run: Path) -> int:
    log = run / "metrics.jsonl"
    lines = read(log) if log.exists() else []
    return int(lines[-1]["step"]) if lines else 0


def _fresh(folder: Path) -> Path:
    """`folder`, or `folder-2`, `folder-3`, ... so that an earlier demo is never touched."""
    names = itertools.chain([folder], (Path(f"{folder}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _newest(checkpoints: Path) -> Path:
    found = committed(checkpoints)
    return found[-1][1] if found else checkpoints


def _mlflow_command(root: Path) -> str:
    # torch, which comes with tracking, takes seconds to import: `flowmill --help` should not.
    from trainer.tracking import open_command

    return open_command(f"sqlite:///{root.resolve()}/mlflow.db")
