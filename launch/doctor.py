"""What this machine can do: what can be tried in a moment is tried, not believed.

A check yields findings; a finding says what was looked for, what was found, and either what it is
good for or what is missing without it and what to install.
"""

import io
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.distributed as dist
from PIL import Image
from rich.table import Table

State = Literal["good", "missing", "broken"]
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One row. `broken` is what the core cannot do without; `missing` is what some work needs."""

    what: str
    found: str
    state: State
    meaning: str


def examine() -> list[Finding]:
    """All findings, in the order of the table. Takes a few seconds; leaves nothing behind."""
    return [finding for check in CHECKS for finding in check()]


def healthy(findings: list[Finding]) -> bool:
    """Nothing that the core needs is missing."""
    return all(finding.state != "broken" for finding in findings)


def to_dict(findings: list[Finding]) -> dict[str, Any]:
    """For programs."""
    return {"healthy": healthy(findings), "findings": [asdict(finding) for finding in findings]}


def to_table(findings: list[Finding]) -> Table:
    """For people."""
    marks = {"good": "[green]✓[/]", "missing": "[yellow]–[/]", "broken": "[bold red]✗[/]"}
    table = Table(
        "", "what", "found", "good for, or missing for what and what to do", title="flowmill"
    )
    for finding in findings:
        cells = (finding.what, finding.found, finding.meaning)
        table.add_row(marks[finding.state], *(cell.replace("[", r"\[") for cell in cells))
    return table


def _python() -> Iterator[Finding]:
    enough = sys.version_info >= (3, 11)
    meaning = (
        "runs everything" if enough else "too old for everything: install Python 3.11 or newer"
    )
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("Python", found, "good" if enough else "broken", meaning)


def _torch() -> Iterator[Finding]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    yield Finding("PyTorch", f"{torch.__version__}, {build}", "good", "models, FSDP2, checkpoints")


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        reason = (
            "training runs on the CPU; large models need a GPU and its driver"
            if torch.version.cuda
            else "training runs on the CPU; for a GPU, install the CUDA build of PyTorch"
        )
        yield Finding("GPU", "none", "missing", reason)
        return
    for index in range(torch.cuda.device_count()):
        it = torch.cuda.get_device_properties(index)
        found = f"{it.name}, {it.total_memory / GIB:.0f} GiB, compute {it.major}.{it.minor}"
        yield Finding(f"GPU {index}", found, "good", "one rank")


def _processor() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    found = (
        f"{cores} cores, {torch.get_num_threads()} threads of PyTorch, "
        f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    )
    yield Finding("CPU", found, "good", "decoding, and training small models")
    simd = torch.backends.cpu.get_cpu_capability()
    slow = simd == "DEFAULT"
    meaning = (
        "no vector units in use: expect slow steps on the CPU" if slow else "vector arithmetic"
    )
    yield Finding("SIMD", simd, "missing" if slow else "good", meaning)


def _bfloat16() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 4096 if device.type == "cuda" else 384
    ratio = _matmul_seconds(torch.float32, size, device) / _matmul_seconds(
        torch.bfloat16, size, device
    )
    meaning = (
        "train.precision=bf16 pays"
        if ratio > 1.2
        else "train.precision=fp32 is as fast here; bf16 still halves what activations hold"
    )
    found = f"{ratio:.1f}x the speed of fp32 on {device.type}"
    yield Finding("bfloat16", found, "good" if ratio > 1.2 else "missing", meaning)


def _backends() -> Iterator[Finding]:
    purposes = {
        "gloo": ("ranks on CPUs, and the small talk of ranks on GPUs", "broken"),
        "nccl": ("ranks on GPUs", "missing"),
        "mpi": ("ranks started by mpirun; torchrun does without", "missing"),
    }
    for backend, (purpose, without) in purposes.items():
        found = _try_backend(backend)
        good = found == "works"
        state: State = "good" if good else "broken" if without == "broken" else "missing"
        meaning = purpose if good else f"missing for {purpose}"
        yield Finding(f"backend {backend}", found, state, meaning)


def _decoders() -> Iterator[Finding]:
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    png = io.BytesIO()
    picture.save(png, format="PNG")
    with Image.open(io.BytesIO(png.getvalue())) as again:
        works = again.convert("RGB").getpixel((3, 3)) == (200, 100, 50)
    found = f"{version('pillow')}, {'decodes' if works else 'decodes wrongly'}"
    yield Finding("pillow", found, "good" if works else "broken", "decoding where DALI is not")
    try:
        import nvidia.dali as dali
    except (ImportError, OSError, RuntimeError) as error:
        absent = isinstance(error, ModuleNotFoundError)
        found = "not installed" if absent else f"does not load: {_line(error)}"
        meaning = "missing for fast decoding: pip install nvidia-dali-cuda120 (Linux)"
        yield Finding("DALI", found, "missing", meaning)
        return
    for device in ("cpu", "mixed") if torch.cuda.is_available() else ("cpu",):
        failure = _try_dali(png.getvalue(), device)
        place = "GPU" if device == "mixed" else "CPU"
        found = f"{dali.__version__}, {failure or 'decodes'}"
        state: State = "missing" if failure else "good"
        meaning = "pillow decodes instead" if failure else f"data.decoder=dali on the {place}"
        yield Finding(f"DALI on {place}", found, state, meaning)


def _packages() -> Iterator[Finding]:
    for name, purpose, install in (
        ("deepspeed", "nothing here yet: DeepSpeed is not used", "no need to install it"),
        ("accelerate", "nothing here yet: accelerate is not used", "no need to install it"),
        ("s3fs", "shards on s3:// storage", "pip install 'flowmill[s3]'"),
    ):
        try:
            yield Finding(name, version(name), "good", purpose)
        except PackageNotFoundError:
            yield Finding(name, "not installed", "missing", f"missing for {purpose}: {install}")


def _compilers() -> Iterator[Finding]:
    compiler = next(
        (c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if _which(c)), None
    )
    header = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    if compiler and header:
        said = _output([compiler, "--version"])
        yield Finding("C++ compiler", said, "good", "train.compile=true on the CPU")
    else:
        found = "none" if not compiler else f"{compiler}, but no Python.h"
        need = (
            "a compiler (apt install g++)" if not compiler else "headers (apt install python3-dev)"
        )
        meaning = f"missing for train.compile=true on the CPU: install {need}"
        yield Finding("C++ compiler", found, "missing", meaning)
    ninja = _output(["ninja", "--version"]) if _which("ninja") else None
    meaning = (
        "building C++ extensions; not used yet"
        if ninja
        else "missing for building C++ extensions; not used yet"
    )
    yield Finding("ninja", ninja or "none", "good" if ninja else "missing", meaning)


def _tracking() -> Iterator[Finding]:
    try:
        found = version("mlflow")
    except PackageNotFoundError:
        meaning = "missing for tracking: pip install mlflow, or set tracking.mlflow=false"
        yield Finding("MLflow", "not installed", "missing", meaning)
        return
    failure = _try_sqlite(Path.cwd())
    if failure:
        meaning = "tracking.uri must name another place or a server; runs cannot be kept here"
        yield Finding("MLflow", f"{found}, no store here: {failure}", "missing", meaning)
    else:
        yield Finding("MLflow", f"{found}, a store can be kept here", "good", "tracking of runs")


def _space() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    state: State = "broken" if not _try_write(Path.cwd()) else "missing" if free < 2 else "good"
    meaning = {
        "broken": "runs cannot be written here: change to a folder of yours",
        "missing": "checkpoints may not fit: a model takes about 16 bytes a parameter each",
        "good": "runs and checkpoints",
    }[state]
    yield Finding("disk", f"{free:.1f} GiB free in {Path.cwd()}", state, meaning)
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield Finding("shared memory", "none", "missing", "missing for fast talk of local ranks")
        return
    free = shutil.disk_usage(shared).free / GIB
    small = free < 0.25
    meaning = (
        "small for talk of local ranks: docker run --shm-size=8g"
        if small
        else "talk of local ranks"
    )
    yield Finding("shared memory", f"{free:.1f} GiB free", "missing" if small else "good", meaning)


def _launchers() -> Iterator[Finding]:
    beside = Path(sys.executable).with_name("torchrun")
    torchrun = str(beside) if beside.exists() else shutil.which("torchrun")
    meaning = (
        "several machines"
        if torchrun
        else "missing for several machines: python -m torch.distributed.run"
    )
    yield Finding("torchrun", torchrun or "none", "good" if torchrun else "missing", meaning)
    tools = [tool for tool in ("sbatch", "squeue", "sinfo") if _which(tool)]
    if len(tools) < 3:
        meaning = "missing for jobs on a cluster: run this on its login node"
        yield Finding("SLURM", ", ".join(tools) or "none", "missing", meaning)
        return
    nodes = _output(["sinfo", "-h", "-o", "%D nodes %T"])
    yield Finding("SLURM", nodes, "good", "jobs on a cluster")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _torch,
    _devices,
    _processor,
    _bfloat16,
    _backends,
    _decoders,
    _packages,
    _compilers,
    _tracking,
    _space,
    _launchers,
)


def _try_backend(backend: str) -> str:
    """`works` if a group of one rank can be made and can sum; else why not."""
    available = {
        "gloo": dist.is_gloo_available,
        "nccl": dist.is_nccl_available,
        "mpi": dist.is_mpi_available,
    }
    if not dist.is_available() or not available[backend]():
        return "not in this build of PyTorch"
    if backend == "nccl" and not torch.cuda.is_available():
        return "no GPU to try it on"
    one = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        meeting = None if backend == "mpi" else f"file://{folder}/meet"
        try:
            dist.init_process_group(
                backend, meeting, rank=0, world_size=1, timeout=timedelta(seconds=20)
            )
            try:
                dist.all_reduce(one)
            finally:
                dist.destroy_process_group()
        except (RuntimeError, ValueError) as error:
            return f"fails: {_line(error)}"
    return "works" if one.item() == 1 else "sums wrongly"


def _try_dali(png: bytes, device: str) -> str | None:
    """None if a pipeline decodes `png` to its one color; else why not."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    on_gpu = device == "mixed"

    @pipeline_def(batch_size=1, num_threads=1, device_id=0 if on_gpu else None)  # type: ignore[untyped-decorator]
    def decode() -> Any:
        encoded = fn.external_source([[np.frombuffer(png, np.uint8)]], cycle=True)
        return fn.decoders.image(encoded, device=device)

    try:
        (output,) = decode().run()
    except RuntimeError as error:
        return f"fails: {_line(error)}"
    image = np.asarray((output.as_cpu() if on_gpu else output).at(0))
    return None if image[3, 3].tolist() == [200, 100, 50] else "decodes wrongly"


def _try_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"flowmill")
    except OSError:
        return False
    return True


def _try_sqlite(folder: Path) -> str | None:
    """None if a database in `folder` takes a row (some network file systems lock wrongly); else why not."""
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".flowmill-doctor-") as place:
            connection = sqlite3.connect(Path(place, "try.db"), timeout=5)
            try:
                connection.execute("create table t (x)")
                connection.execute("insert into t values (1)")
                connection.commit()
            finally:
                connection.close()
    except (OSError, sqlite3.Error) as error:
        return _line(error)
    return None


def _matmul_seconds(dtype: torch.dtype, size: int, device: torch.device) -> float:
    """The fastest of a few products of square matrices."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        product = a @ a
        if product.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def _which(program: str | None) -> bool:
    return program is not None and shutil.which(program) is not None


def _output(command: list[str]) -> str:
    """First line a program prints, or why it printed none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"fails: {_line(error)}"
    return done.stdout.strip().split("\n", 1)[0] or "(silent)"


def _line(error: Exception) -> str:
    """The first line of an error, short enough for a table."""
    return str(error).strip().split("\n", 1)[0][:120] or type(error).__name__
