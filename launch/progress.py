"""What a person sees while a run trains: one live line on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Terminal(Console):
    """Standard error; once nobody reads it any more what is said is lost, and training goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Also for whatever else writes there: warnings, the interpreter at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


class ProgressLine:
    """Loss, samples a second, data wait and time left; quiet between `log_every` steps off a terminal."""

    def __init__(self, steps: int, log_every: int) -> None:
        self._steps, self._log_every = steps, log_every
        self._console = Terminal(stderr=True, soft_wrap=True)
        self._bar = (
            Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self._console,
            )
            if sys.stderr.isatty()
            else None
        )
        self._task = self._bar.add_task("starting", total=steps) if self._bar else None
        self._clock: tuple[float, int] | None = None

    def __enter__(self) -> "ProgressLine":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def note(self, text: str) -> None:
        """Something worth a line of its own: a resume, a checkpoint, a warning."""
        self._console.print(text, highlight=False, markup=False)

    def step(self, line: Mapping[str, Any]) -> None:
        """One step of `metrics.jsonl`."""
        step = int(line["step"])
        if self._clock is None:
            self._clock = (time.monotonic(), step)
        if self._bar is None and step % self._log_every and step != self._steps:
            return
        text = self._text(line, step)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        else:
            self.note(f"step {step}/{self._steps}  {text}")

    def _text(self, line: Mapping[str, Any], step: int) -> str:
        start, first = self._clock or (time.monotonic(), step)
        done = step - first
        left = (time.monotonic() - start) / done * (self._steps - step) if done else None
        wait = line["data_wait_seconds"] / max(line["step_seconds"], 1e-9)
        loss = line["loss"]
        return (
            f"loss {loss:.4f}  {line['samples_per_second']:.0f} samples/s  "
            f"data wait {wait:.1%}  ETA {_duration(left)}"
        )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
