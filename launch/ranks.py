"""Start the ranks of one machine, watch them, and say which one died.

The children run the very command line of the parent, with RANK and WORLD_SIZE in their environment as
torchrun would set them. Rank 0 keeps the terminal, the others write `logs/rank-N.log`.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from flows.errors import UserError

GRACE_SECONDS = 15.0
LOST_OTHERS = 3  # exit code of a rank that ends because another one has ended
STOPPED = 75  # exit code of a training that a signal ended with a checkpoint (EX_TEMPFAIL)
INTERRUPTED = 130  # exit code where Ctrl-C left no time for one, as a shell has it
PARENT = "FLOWMILL_PARENT"
# How Gloo and the store say that the other side of a connection has gone, or has been silent.
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe")


class LostOthers(UserError):
    """Another rank has ended or is silent; that one knows the reason."""


@dataclass(frozen=True)
class _Rank:
    """A process, and where what it says lies in its log; rank 0 has the terminal instead."""

    process: subprocess.Popen[bytes]
    log: Path | None
    begin: int

    def said(self) -> list[str]:
        """What it wrote since it was started."""
        if self.log is None:
            return []
        return self.log.read_bytes()[self.begin :].decode(errors="replace").strip().splitlines()


def joined_by_launcher() -> bool:
    """Whether torchrun, or the parent in this module, has started this process as a rank.

    Raises UserError if only half of what a launcher says is there.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(given) == 1:
        raise UserError(
            f"{given[0]} is set and the other of RANK and WORLD_SIZE is not; start with torchrun or "
            f"--ranks, which set both, or unset {given[0]}."
        )
    return bool(given)


def world_size_from_launcher() -> int:
    """WORLD_SIZE as the launcher set it. Raises UserError if it is no number."""
    text = os.environ["WORLD_SIZE"]
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE = {text!r} is not a number of ranks; start with torchrun or --ranks."
        )
    return int(text)


def started_by_flowmill() -> bool:
    """Whether this process is a rank that `run_ranks` started."""
    return PARENT in os.environ


@contextmanager
def as_rank() -> Iterator[None]:
    """Turn the failure of a collective whose other side has gone into LostOthers."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not any(sign in text for sign in _LOST):
            raise
        raise LostOthers(
            f"Rank {os.environ.get('RANK', 0)} lost the other ranks ({text.splitlines()[0]}); "
            "the rank that ended first says why."
        ) from error


def place_from_launcher() -> tuple[int, int, int]:
    """(rank, rank on this machine, number of ranks). Raises UserError if they do not fit."""
    world_size = world_size_from_launcher()
    places = [os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK")]
    if not all(text.isdecimal() and int(text) < world_size for text in places):
        raise UserError(
            f"RANK = {places[0]!r} and LOCAL_RANK = {places[1]!r} are no places among WORLD_SIZE = "
            f"{world_size} ranks; start with torchrun or --ranks."
        )
    return int(places[0]), int(places[1]), world_size


def run_ranks(arguments: Sequence[str], ranks: int, logs: Path) -> int:
    """Run `flowmill <arguments>` as `ranks` local processes; the exit code of the first to fail, or STOPPED.

    A signal to the parent goes to every rank. When one rank dies the others get GRACE_SECONDS to end,
    then they are killed; a parent that is killed takes its ranks with it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    started = [_start(arguments, rank, ranks, port, logs) for rank in range(ranks)]
    with _forwarded_signals([rank.process for rank in started]):
        failed = _wait(started)
    codes = [rank.process.returncode for rank in started]
    if failed is None:
        return STOPPED if STOPPED in codes else 0
    code = codes[failed]
    if code == INTERRUPTED:
        return code  # rank 0 has said so
    sys.stderr.write(_obituary(failed, code, started[failed]))
    return code if code > 0 else 128 - code


def die_with_parent() -> None:
    """End this rank when the process that started it is gone (SIGKILL leaves no time to say so)."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _start(arguments: Sequence[str], rank: int, ranks: int, port: int, logs: Path) -> _Rank:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT: str(os.getpid()),
    }
    # Ranks share the cores: a thread pool of all cores in each would fight over them.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    command = [sys.executable, "-m", "launch", *arguments]
    if rank == 0:
        return _Rank(subprocess.Popen(command, env=environment), None, 0)
    path = logs / f"rank-{rank}.log"
    with path.open("ab") as log:
        begin = log.tell()
        return _Rank(
            subprocess.Popen(command, env=environment, stdout=log, stderr=log), path, begin
        )


def _wait(ranks: Sequence[_Rank]) -> int | None:
    """Wait for all, ending the rest when one fails; the rank that failed for a reason of its own."""
    failed: list[int] = []
    deadline = float("inf")
    while True:
        codes = [rank.process.poll() for rank in ranks]
        if time.monotonic() < deadline:
            failed += [
                rank
                for rank, code in enumerate(codes)
                if code not in (None, 0, STOPPED) and rank not in failed
            ]
        if None not in codes:
            break
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.process.kill()
        time.sleep(0.05)
    # A rank may notice that another is gone before that one has ended.
    return next((rank for rank in failed if codes[rank] != LOST_OTHERS), next(iter(failed), None))


def _obituary(number: int, code: int, rank: _Rank) -> str:
    """Why the run ended; what rank 0 had to say stands on the terminal already."""
    said = rank.said()
    where = f"; its log is {rank.log}" if rank.log else ""
    if code == 2:
        sentences = "".join(f"{line}\n" for line in said if line.startswith("error: "))
        return sentences + (f"(rank {number} said so{where})\n" if sentences else "")
    if code < 0:
        how = f"was ended by signal {signal.Signals(-code).name}"
    else:
        how = f"ended with exit code {code}{f': {said[-1]}' if said else ''}"
    return (
        f"error: rank {number} {how}{where}; the same command goes on from the newest checkpoint, if "
        "there is one.\n"
    )


@contextmanager
def _forwarded_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 reach every rank: they save a checkpoint and end."""

    def forward(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {kind: signal.signal(kind, forward) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
