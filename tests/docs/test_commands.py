"""Every command of the documentation works as it is printed there."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What sets up the machine cannot run inside its own suite; the demo has a test of its own.
BY_MAKE = "make "


def lines(block: str) -> list[str]:
    """The commands of an `sh` block, continuation lines joined."""
    joined = block.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.strip() and not line.startswith((BY_MAKE, "#"))]


def steps(page: Path) -> list[list[str]]:
    """What runs, in order: the lines of `sh` blocks, and `python` blocks together with those before."""
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    found: list[list[str]] = []
    python = ""
    for language, group in itertools.groupby(blocks, key=lambda block: block[0]):
        text = "\n".join(block for _, block in group)
        if language == "sh":
            found += [["bash", "-c", line] for line in lines(text)]
        else:
            python += text
            found.append([sys.executable, "-c", python])
    return found


PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if steps(page)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_a_page_work_in_an_empty_folder(page: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for command in steps(page):
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, f"{command[-1]}\n{result.stdout}\n{result.stderr}"


def test_links_of_the_documentation_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {link}"
        for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert broken == []


def test_files_named_in_the_documentation_exist() -> None:
    named = {
        (page.name, name)
        for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for name in re.findall(
            r"`((?:flows|data_pipeline|parallel|trainer|launch|benchmarks|tests|docs|recipes)/[\w/.-]*)`",
            page.read_text(encoding="utf-8"),
        )
    }
    missing = [f"{page}: {name}" for page, name in sorted(named) if not (ROOT / name).exists()]
    assert named
    assert missing == []


def test_no_figure_is_missing_in_the_documentation() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert "@@" not in page.read_text(encoding="utf-8"), page
