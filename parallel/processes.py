"""Ranks: which device each drives, and how they find each other.

The launcher (torchrun's or our own) tells a process its place by RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT; a process that was told nothing is the only one. A group is made for a
single rank too, so that meshes and checkpoints are the same code on one rank and on a thousand.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from flows.errors import UserError

T = TypeVar("T")
DevicePreference = Literal["auto", "cpu", "cuda"]
# Parameters of glibc's mallopt, of <malloc.h>.
TRIM_THRESHOLD, MOST_MAPPINGS = -1, -4


@dataclass(frozen=True)
class Ranks:
    """This process's place.

    rank: among all processes
    local_rank: among those of this machine, the index of its accelerator
    device: what it computes on
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """True on the one rank that speaks for all."""
        return self.rank == 0


def start(preference: DevicePreference, timeout_seconds: float) -> Ranks:
    """Join the process group; a collective that takes longer than the timeout is an error.

    Raises UserError where the environment of the launcher is incomplete or the device is missing.
    """
    rank, world_size, local_rank = (
        _integer("RANK", 0),
        _integer("WORLD_SIZE", 1),
        _integer("LOCAL_RANK", 0),
    )
    if rank >= world_size:
        raise UserError(
            f"RANK is {rank} but WORLD_SIZE is {world_size}; ranks are numbered from 0, "
            "so start them by `flowmill train` or torchrun."
        )
    device = _take_device(preference, local_rank)
    # The CPU backend beside NCCL carries checkpoint plans and other small objects.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(
        backend,
        store=_store(rank, world_size, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return Ranks(rank, world_size, local_rank, device)


def alone() -> Ranks:
    """This process by itself, in no group."""
    return Ranks(0, 1, 0, _take_device("auto", 0))


def stop() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: T) -> list[T] | None:
    """The first rank gets what every rank gives, in the order of the ranks, the others None."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank; the others wait for it."""
    if not dist.is_initialized():
        return make()
    values: list[Any] = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(values, src=0)
    made: T = values[0]
    return made


def choose_device(preference: DevicePreference, local_rank: int) -> torch.device:
    """The accelerator of this rank, or the CPU; "auto" takes CUDA where there is any."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if preference == "cpu" or (preference == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise UserError(
            f"Rank {local_rank} of this machine has no CUDA device of its own, for the machine has "
            f"{count}; start at most {count} ranks on it, or ask for the CPU."
        )
    return torch.device("cuda", local_rank)


def keep_freed_memory() -> None:
    """Let this process keep the memory of tensors that are gone, for the tensors to come.

    The C library would give that of large ones back to the system, which clears it for the next ones, in
    every step. The process stays as large as it was at its largest, as with the allocators of accelerators.
    Nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MOST_MAPPINGS, 0)  # large blocks are not mapped one by one
        mallopt(TRIM_THRESHOLD, -1)  # and what is free at the end of memory stays


def _take_device(preference: DevicePreference, local_rank: int) -> torch.device:
    device = choose_device(preference, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    return device


def _store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Where ranks find each other's addresses.

    Each attempt of an elastic launcher has its own prefix: the launcher's store outlives an
    attempt, and the addresses of dead ranks would be found in it.
    """
    if world_size == 1:
        return HashStore()
    address = os.environ.get("MASTER_ADDR")
    if address is None:
        raise UserError(
            f"WORLD_SIZE is {world_size} but MASTER_ADDR is not set; start the ranks by "
            f"`flowmill train --ranks {world_size}` or torchrun, or set it and MASTER_PORT."
        )
    launcher_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port = _integer("MASTER_PORT", None)
    is_host = rank == 0 and not launcher_hosts
    try:
        store = TCPStore(address, port, world_size, is_master=is_host, timeout=timeout)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Rank {rank} of {world_size} did not meet the others at {address}:{port} ({reason}); "
            "check that all ranks were started, and MASTER_ADDR and MASTER_PORT."
        ) from error
    return PrefixStore(f"attempt{_integer('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _integer(name: str, absent: int | None) -> int:
    value = os.environ.get(name)
    if value is None and absent is not None:
        return absent
    if value is None or not value.isdigit():
        raise UserError(
            f"The environment variable {name} is {value!r}, which is not a whole number; "
            "it is the launcher that sets it, so start the ranks by `flowmill train` or torchrun."
        )
    return int(value)
