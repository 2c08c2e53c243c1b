"""Real ranks for tests: one process each, gloo between them, nothing left behind.

Ranks are forked from a process that has imported what every rank imports, and then are given what fresh
processes have: the parent's variables, and random numbers of their own, without which ranks that draw
alike by chance would look as if they drew alike by design. The order of sets alone is one for all of
them, other than of ranks that a launcher starts (tests/launch, tests/trainer/test_resume_law.py). The
parent hosts the store where ranks meet, on a port the system picks, as an elastic launcher does; so runs
that overlap do not meet each other. A rank that fails ends the run with its own traceback, the others
are killed.
"""

import faulthandler
import io
import multiprocessing
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from parallel import processes
from parallel.processes import Ranks

COLLECTIVE_TIMEOUT_SECONDS = 60.0
# What takes seconds to import.
HEAVY = ["torch._dynamo", "torch.distributed.fsdp", "trainer.running"]

# How a process ends whose native libraries have spoilt its memory.
CRASHES = (-signal.SIGABRT, -signal.SIGSEGV)


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; the message is its traceback."""


class RankCrashed(RankFailed):
    """A rank's native code took it down; where it was stands in its standard error."""


def run_ranks(
    function: Callable[..., Any], world_size: int, timeout: float = 100.0, **kwargs: Any
) -> list[Any]:
    """Call `function(ranks, **kwargs)` on every rank; its results in rank order.

    function: of a module's top level, so that another process can import it
    result: numbers, text, tensors, and lists and dictionaries of them

    Ranks whose native code crashes are started once more, with a warning. There is no native code here,
    but gloo, or what lies below it, has crashed once in some hundred runs of four ranks
    ("malloc(): unaligned tcache chunk detected"), in none of them under valgrind.
    """
    try:
        return _run_once(function, world_size, timeout, kwargs)
    except RankCrashed as crash:
        warnings.warn(f"{crash}: its ranks were started once more", stacklevel=2)
        return _run_once(function, world_size, timeout, kwargs)


def _run_once(
    function: Callable[..., Any], world_size: int, timeout: float, kwargs: dict[str, Any]
) -> list[Any]:
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    ranks: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(world_size):
            parent, child = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, store.port)
            process = context.Process(
                target=_rank_main, args=(function, environment, child, kwargs), daemon=True
            )
            process.start()
            child.close()
            ranks.append((process, parent))
        return _collect(ranks, time.monotonic() + timeout)
    except RankFailed as failed:
        # Often it is another rank that tells, of a connection that broke, before the process has ended.
        time.sleep(0.5)
        codes = [process.exitcode for process, _ in ranks]
        crashed = [rank for rank, code in enumerate(codes) if code in CRASHES]
        if crashed:
            raise RankCrashed(f"rank {crashed[0]} crashed ({codes[crashed[0]]})") from failed
        raise
    finally:
        for process, parent in ranks:
            _end(process)
            parent.close()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }


def _rank_main(
    function: Callable[..., Any],
    environment: dict[str, str],
    connection: Connection,
    kwargs: dict[str, Any],
) -> None:
    # Its own process group, so that whatever it starts can be killed with it.
    os.setpgid(0, 0)
    # The server has the variables of the time when it began.
    os.environ.clear()
    os.environ.update(environment)
    torch.seed()
    np.random.seed()
    torch.set_num_threads(1)
    faulthandler.enable()
    buffer = io.BytesIO()
    try:
        ranks: Ranks = processes.start("cpu", COLLECTIVE_TIMEOUT_SECONDS)
        torch.save({"result": function(ranks, **kwargs)}, buffer)
        dist.barrier()
    except BaseException:  # noqa: BLE001 - reported to the parent, whatever it is
        buffer = io.BytesIO()
        torch.save({"error": traceback.format_exc()}, buffer)
    connection.send_bytes(buffer.getvalue())
    processes.stop()


def _collect(ranks: list[tuple[BaseProcess, Connection]], deadline: float) -> list[Any]:
    """Results as they come; the first failure ends the waiting."""
    results: dict[int, Any] = {}
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(waiting.values())} did not end in time")
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[call-overload]
            results[rank] = _receive(connection, rank, ranks[rank][0])  # type: ignore[arg-type]
    return [results[rank] for rank in range(len(ranks))]


def _receive(connection: Connection, rank: int, process: BaseProcess) -> Any:
    try:
        message = torch.load(io.BytesIO(connection.recv_bytes()), weights_only=True)
    except EOFError:
        process.join(5.0)
        raise RankFailed(f"rank {rank} died with exit code {process.exitcode}") from None
    if "error" in message:
        raise RankFailed(f"rank {rank} failed:\n{message['error']}")
    return message["result"]


def _end(process: BaseProcess) -> None:
    """Give a rank that has answered a moment to leave; then kill it and all it started."""
    process.join(0.5 if process.is_alive() else None)
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        # Gone with all its children, or killed before it had a group of its own.
        process.kill()
    process.join()
