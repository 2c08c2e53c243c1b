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
from pathlib import Path
from types import FrameType

from flows.errors import UserError

GRACE_SECONDS = 15.0


def joined_by_launcher() -> bool:
    """Whether torchrun, or the parent in this module, has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size_from_launcher() -> int:
    """WORLD_SIZE as the launcher set it. Raises UserError if it is no number."""
    text = os.environ["WORLD_SIZE"]
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE = {text!r} is not a number of ranks; start with torchrun or --ranks."
        )
    return int(text)


def run_ranks(arguments: Sequence[str], ranks: int, logs: Path) -> int:
    """Run `flowmill <arguments>` as `ranks` local processes; the exit code of the first to fail.

    A signal to the parent goes to every rank. When one rank dies the others get GRACE_SECONDS to end,
    then they are killed; a parent that is killed takes its ranks with it.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    processes = [_start(arguments, rank, ranks, port, logs) for rank in range(ranks)]
    with _forwarded_signals(processes):
        return _watch(processes, logs)


def die_with_parent() -> None:
    """End this rank when the process that started it is gone (SIGKILL leaves no time to say so)."""
    parent = os.environ.get("FLOWMILL_PARENT")
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _start(
    arguments: Sequence[str], rank: int, ranks: int, port: int, logs: Path
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "FLOWMILL_PARENT": str(os.getpid()),
    }
    # Ranks share the cores: a thread pool of all cores in each would fight over them.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    command = [sys.executable, "-m", "launch", *arguments]
    if rank == 0:
        return subprocess.Popen(command, env=environment)
    with (logs / f"rank-{rank}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _watch(processes: Sequence[subprocess.Popen[bytes]], logs: Path) -> int:
    """Wait for all; on the first failure end the rest and report it on stderr."""
    failed: int | None = None
    deadline = float("inf")
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        if failed is None and any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    ends = [process.wait() for process in processes]
    if not any(ends):
        return 0
    rank = failed if failed is not None else next(r for r, code in enumerate(ends) if code)
    sys.stderr.write(_obituary(rank, ends[rank], logs))
    return ends[rank] if ends[rank] > 0 else 128 - ends[rank]


def _obituary(rank: int, code: int, logs: Path) -> str:
    how = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    if rank == 0:
        return f"rank 0 ended with {how}\n"
    log = logs / f"rank-{rank}.log"
    lines = log.read_text(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    return f"rank {rank} ended with {how}{last} (its log is {log})\n"


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
