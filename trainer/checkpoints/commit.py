"""How a folder becomes a checkpoint: written under a hidden name, then one rename.

    .writing-00000100       being written; never listed, swept away by the next save
    step-00000100           committed
    step-00000100.replaced  committed, its step being saved again; listed until the new one is there
    .deleting-...           being deleted; never listed

At every moment the folder lists the checkpoints it listed before, or those and the new one. Rank
0 alone comes here.
"""

import logging
import os
import re
import shutil
from collections.abc import Container
from pathlib import Path

from flows.errors import UserError
from trainer.checkpoints.manifest import Manifest, damaged_sizes, read_manifest, write_manifest

logger = logging.getLogger(__name__)

COMMITTED = re.compile(r"step-(\d{8,})(\.replaced)?")


def writing_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies until it is committed."""
    return folder / f".writing-{step:08d}"


def committed(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every committed checkpoint, oldest step first."""
    found: dict[int, Path] = {}
    if not folder.is_dir():
        return []
    for path in sorted(folder.iterdir()):  # `step-1` sorts before `step-1.replaced`
        match = COMMITTED.fullmatch(path.name)
        if match and path.is_dir():
            found.setdefault(int(match[1]), path)
    return sorted(found.items())


def begin(folder: Path, step: int) -> None:
    """Sweep away what interrupted saves left behind, and make the folder to write into."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {path for _, path in committed(folder)}
    for path in folder.iterdir():
        replaced = path.name.endswith(".replaced") and path not in kept
        if replaced or path.name.startswith((".writing-", ".deleting-")):
            shutil.rmtree(path)
    writing_folder(folder, step).mkdir()


def commit(folder: Path, manifest: Manifest) -> Path:
    """Make the folder written for `manifest.step` a checkpoint; its path.

    UserError where a file of another rank is not there: the ranks do not share the folder.
    """
    writing = writing_folder(folder, manifest.step)
    if (unseen := damaged_sizes(writing, manifest)) is not None:
        raise UserError(
            f"{unseen} as rank 0 sees it; put run.dir on a file system that all ranks share."
        )
    _sync(write_manifest(writing, manifest))
    _sync(writing)
    final = folder / f"step-{manifest.step:08d}"
    if final.exists():
        final.rename(f"{final}.replaced")
    writing.rename(final)
    _sync(folder)
    return final


def retire(folder: Path, step: int, keep: int, refused: Container[int]) -> None:
    """Delete all but the newest `keep` whole checkpoints, that of `step` just committed.

    Checkpoints of later steps, and those that were `refused` as damaged when the run went on, do not count:
    they stay until as many whole ones are newer. What cannot be deleted is left with a warning: the run
    goes on.
    """
    whole = [
        at
        for at, path in committed(folder)
        if at <= step and at not in refused and _looks_whole(path)
    ]
    oldest = whole[-keep:][0]
    old = [path for at, path in committed(folder) if at < oldest]
    listed = {path for _, path in committed(folder)}
    aside = [path for path in folder.glob("step-*.replaced") if path not in listed]
    for path in [*old, *aside]:
        hidden = folder / f".deleting-{path.name}"
        try:
            path.rename(hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            logger.warning("%s could not be deleted (%s)", path, error.strerror)


def _looks_whole(checkpoint: Path) -> bool:
    """Manifest readable, all files there with their sizes; no checksums, for they take long."""
    try:
        return damaged_sizes(checkpoint, read_manifest(checkpoint)) is None
    except UserError:
        return False


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
