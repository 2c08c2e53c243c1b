"""What a run ran on, so that its numbers can be explained later."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("flowmill", "torch", "numpy", "mlflow", "nvidia-dali-cuda120", "pillow", "deepspeed")


def environment(world_size: int, device: torch.device) -> dict[str, str]:
    """Versions, devices and the git commit of the code (if it lies in a git tree), as tags."""
    cuda = device.type == "cuda"
    found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch.cuda": str(torch.version.cuda or "none"),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "world_size": str(world_size),
        "cpu_threads": str(torch.get_num_threads()),
    }
    for package in _PACKAGES:
        try:
            found[f"version.{package}"] = version(package)
        except PackageNotFoundError:
            continue
    commit = git_commit(Path(__file__).parent)
    return found | ({"git.commit": commit} if commit else {})


def git_commit(folder: Path) -> str | None:
    """The commit that `folder` lies in, with `+changes` if files differ; None without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()
