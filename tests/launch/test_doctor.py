"""The doctor says what is there, tries it, and says no only where the core cannot run."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from launch.doctor import Finding, examine, healthy, to_table

ASKED = {
    "Python", "PyTorch", "CPU", "SIMD", "bfloat16", "backend gloo", "backend nccl", "backend mpi",
    "pillow", "deepspeed", "accelerate", "s3fs", "C++ compiler", "ninja", "MLflow", "disk",
    "shared memory", "torchrun", "SLURM",
}  # fmt: skip


def _doctor(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "doctor", *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def _by_name(findings: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {finding["what"]: finding for finding in findings}


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    return examine()


def test_every_question_is_answered_and_every_gap_explained(findings: list[Finding]) -> None:
    names = [finding.what for finding in findings]
    assert set(names) >= ASKED
    assert any(name.startswith("GPU") for name in names)
    assert any(name.startswith("DALI") for name in names)
    assert len(names) == len(set(names))
    assert all(finding.found and finding.meaning for finding in findings)


def test_what_this_suite_runs_on_is_found_working(findings: list[Finding]) -> None:
    found = {finding.what: finding for finding in findings}
    assert found["backend gloo"].found == "works"
    assert found["PyTorch"].found.startswith(torch.__version__)
    for core in ("Python", "pillow", "backend gloo", "disk", "MLflow"):
        assert found[core].state == "good", core
    nccl = "good" if torch.cuda.is_available() else "missing"
    assert found["backend nccl"].state == nccl
    assert healthy(findings)


def test_an_examination_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    examine()
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


def test_the_table_shows_every_finding(findings: list[Finding]) -> None:
    brackets = Finding("odd", "a [bold] claim", "broken", "install flowmill[s3]")
    console = Console(file=io.StringIO(), width=300)
    console.print(to_table([*findings, brackets]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for finding in findings:
        assert finding.what in text
        assert finding.found in text
    assert "a [bold] claim" in text
    assert "install flowmill[s3]" in text
    assert not healthy([*findings, brackets])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_json_says_what_is_missing_and_the_exit_code_that_it_is_needed(tmp_path: Path) -> None:
    """/proc takes no file, not even from root; an empty PATH has neither compiler nor SLURM."""
    code, out = _doctor(Path("/proc"), "--json", PATH=str(tmp_path), CXX="")
    report = json.loads(out)
    found = _by_name(report["findings"])
    assert (code, report["healthy"]) == (1, False)
    assert found["disk"]["state"] == "broken"
    assert "no store here" in found["MLflow"]["found"]
    for tool in ("C++ compiler", "ninja", "SLURM"):
        assert found[tool]["state"] == "missing", tool
        assert found[tool]["found"] == "none", tool
        assert "missing for" in found[tool]["meaning"], tool


def test_tools_on_the_path_are_asked(tmp_path: Path) -> None:
    for tool in ("sbatch", "squeue", "sinfo"):
        program = tmp_path / tool
        program.write_text("#!/bin/sh\necho 4 nodes idle\n")
        program.chmod(0o755)
    code, out = _doctor(tmp_path, "--json", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = _by_name(json.loads(out)["findings"])
    assert code == 0
    assert found["SLURM"] == {
        "what": "SLURM",
        "found": "4 nodes idle",
        "state": "good",
        "meaning": "jobs on a cluster",
    }
