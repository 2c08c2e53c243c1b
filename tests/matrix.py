"""`make matrix`: every family under every layout against one rank, and checkpoints from each layout to each
other, as the tables of `docs/layouts.md`.

Each run of the first is a recipe of `tests.trainer.families` trained by the trainer's own loop on real
ranks. The suite holds single cells; this prints all of them, and fails if one is past its gate.
"""

import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.errors import UserError
from parallel.processes import Ranks
from tests.distributed.harness import run_ranks
from tests.trainer import families, runs, ties
from tests.trainer import test_checkpoint_matrix as matrix_of_checkpoints
from trainer.assembly import plan
from trainer.recipe import override_recipe

PAGE = Path(__file__).parents[1] / "docs" / "layouts.md"
BEGIN, END = "<!-- begin: make matrix -->", "<!-- end: make matrix -->"

FAMILIES = {
    "SiT": "dit",
    "MMDiT": "mmdit",
    "TarFlow": "tarflow",
    "STARFlow": "starflow",
    "Jet": "jet",
    "DiT-MoE": "dit_moe",
}
DDP, TP, CP = "parallel.strategy=ddp", "parallel.tp=2", "parallel.cp=2"
EP, PP = "parallel.ep=2", "parallel.pp=2"
SMALL = "train.microbatch=2"
RING, ZERO = "parallel.context=ring", "parallel.engine=deepspeed"
# Layout -> ranks, and what it changes in a recipe.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 rank": (1, []),
    "DDP 2": (2, [DDP]),
    "FSDP2 2": (2, ["parallel.strategy=fsdp"]),
    "FSDP2 4": (4, ["parallel.strategy=fsdp"]),
    "HSDP 2x2": (4, ["parallel.strategy=hsdp"]),
    "TP 2": (2, [TP, "parallel.strategy=none"]),
    "TP+SP 2": (2, [TP, "parallel.strategy=none", "parallel.sequence=true"]),
    "CP-Ulysses 2": (2, [CP, DDP]),
    "CP-ring 2": (2, [CP, DDP, RING]),
    "TP 2 x FSDP2 2": (4, [TP, "parallel.strategy=fsdp"]),
    "CP 2 x FSDP2 2": (4, [CP, "parallel.strategy=fsdp"]),
    "TP 2 x CP-ring 2": (4, [TP, CP, DDP, RING]),
    "EP 2": (2, [EP]),
    "EP 4": (4, ["parallel.ep=4"]),
    "EP 2 x FSDP2 2": (4, [EP]),
    "EP 2 x HSDP 2x2": (4, [EP, "parallel.strategy=hsdp"]),
    "EP 2 x CP 2": (2, [EP, CP]),
    "EP 2 x TP 2": (4, [EP, TP]),
    "PP 2, 1F1B": (2, [PP, SMALL]),
    "PP 2, ZBV": (2, [PP, SMALL, "parallel.schedule=zbv"]),
    "PP 2, BitPipe": (2, [PP, SMALL, "parallel.schedule=bitpipe"]),
    "PP 2 x FSDP2 2": (4, [PP, SMALL]),
    "PP 2 x TP 2": (4, [PP, SMALL, TP]),
    "PP 2 x EP 2": (4, [PP, SMALL, EP]),
    "ZeRO-1 2": (2, [ZERO, "parallel.deepspeed.stage=1"]),
    "ZeRO-2 2": (2, [ZERO, "parallel.deepspeed.stage=2"]),
    "ZeRO-3 2": (2, [ZERO, "parallel.deepspeed.stage=3"]),
    "Accelerate DDP 2": (2, ["parallel.engine=accelerate", DDP]),
    "Accelerate FSDP2 2": (2, ["parallel.engine=accelerate", "parallel.strategy=fsdp"]),
}
DENSE = ("SiT", "MMDiT", "TarFlow", "STARFlow", "Jet")
# Layout -> families that it is refused for, by a sentence.
REFUSED: dict[str, tuple[str, ...]] = {
    "TP+SP 2": ("DiT-MoE",),
    **{layout: DENSE for layout in LAYOUTS if "EP" in layout},
    **dict.fromkeys(("PP 2", "PP 2 x FSDP2 2", "PP 2 x TP 2"), ("Jet",)),
}
GATE, NORM_GATE = 1e-5, 1e-6
MOVED = (
    "The largest relative difference, after ten more steps, of losses, weights, averages and moments from "
    "a run of one rank that\nwas never stopped. The gate is 1e-5."
)
MEASURES = ("loss", "gradient norm", "weights", "averages")

# What one cell holds: a number for each of `MEASURES`, or why there is none.
Cell = dict[str, float] | str


def train_families(
    ranks: Ranks, folder: str, changes: Sequence[str], names: Sequence[str]
) -> dict[str, str]:
    """Train each family in turn, in one process group; the sentences of those that are refused."""
    refused = {}
    for name in names:
        place = Path(folder, name)
        recipe = override_recipe(families.recipe(name, place), ["sample.every=0", *changes])
        try:
            made = plan(recipe, ranks.world_size)
        except UserError as error:
            refused[name] = str(error)
            continue
        runs.train_as_rank(made, ranks)
    return refused


def measure(folder: Path, reference: Path) -> dict[str, float]:
    """Relative differences of two runs: of series by their largest, of weights by their L2 norm."""
    found = {}
    for measure, key in zip(MEASURES[:2], ("loss", "grad_norm"), strict=True):
        ours, theirs = runs.series(folder, key), runs.series(reference, key)
        # Likelihoods pass through zero, where nothing is relative to them.
        found[measure] = float((ours - theirs).abs().max() / theirs.abs().mean())
    ours, theirs = runs.tensors(folder), runs.tensors(reference)
    for measure, part in zip(MEASURES[2:], ("model.", "ema."), strict=True):
        found[measure] = runs.distance(ours, theirs, part)
    return found


def passes(layout: str, name: str, cell: Cell) -> bool:
    """Numbers within their gates, and refusals of what is known to be refused alone."""
    known = name in REFUSED.get(layout.split(",")[0], ())
    if isinstance(cell, str) or known:
        return isinstance(cell, str) and known
    return max(cell.values()) <= GATE and cell["gradient norm"] <= NORM_GATE


def matrix(layouts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Cell]]:
    """Layout -> family -> cell."""
    found: dict[str, dict[str, Cell]] = {}
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        keys = [FAMILIES[name] for name in names]
        one = Path(folder, "reference")
        run_ranks(train_families, 1, timeout=600.0, folder=str(one), changes=[], names=keys)
        for layout in layouts:
            ranks, changes = LAYOUTS[layout]
            place = Path(folder, layout)
            print(f"{layout} ...", file=sys.stderr, flush=True)
            # Accelerate makes its FSDP once a process.
            apart = [[key] for key in keys] if "Accelerate FSDP2" in layout else [keys]
            refused = {
                name: said
                for together in apart
                for name, said in run_ranks(
                    train_families,
                    ranks,
                    timeout=600.0,
                    folder=str(place),
                    changes=changes,
                    names=together,
                )[0].items()
            }
            found[layout] = {
                name: refused.get(key) or measure(place / key, one / key)
                for name, key in zip(names, keys, strict=True)
            }
            if "dit_moe" in keys and "dit_moe" not in refused:
                say_ties(layout, place / "dit_moe", one / "dit_moe")
    return found


def say_ties(layout: str, folder: Path, reference: Path) -> None:
    """A layout whose choices of experts were turned by rounding is past its gate, and it is said why."""
    try:
        ties.check(folder, reference, GATE)
    except ties.RoutingTie as tie:
        print(f"DiT-MoE under {layout}: {tie}", file=sys.stderr, flush=True)


def page(found: dict[str, dict[str, Cell]], names: Sequence[str]) -> str:
    """The tables: the largest number of each cell, then all of them, then the refusals."""
    layouts = list(found)
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {layout} | "
        + " | ".join(_largest(layout, name, found[layout][name]) for name in names)
        + " |"
        for layout in layouts
    ]
    for name in names:
        lines += ["", f"### {name}", "", "| | " + " | ".join(MEASURES) + " |", "|---" * 5 + "|"]
        for layout in layouts:
            cell = found[layout][name]
            if not isinstance(cell, str):
                numbers = " | ".join(f"{cell[measure]:.1e}" for measure in MEASURES)
                lines.append(f"| {layout} | {numbers} |")
    sentences: dict[str, list[str]] = {}
    for layout in layouts:
        for name in names:
            if isinstance(cell := found[layout][name], str):
                sentences.setdefault(cell, []).append(f"{name} under {layout}")
    lines += ["", "### What is refused, and what is said", ""]
    lines += [f"- {', '.join(places)}: `{sentence}`" for sentence, places in sentences.items()]
    return "\n".join(lines)


def _largest(layout: str, name: str, cell: Cell) -> str:
    if isinstance(cell, str):
        return "refused"
    return f"{max(cell.values()):.1e}" + (
        "" if passes(layout, name, cell) else " **past its gate**"
    )


def checkpoints() -> dict[tuple[str, str], float]:
    """(saved under, gone on under) -> the largest difference, of losses, weights, averages and moments."""
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        whole = run_ranks(never_stopped, 1, timeout=300.0, folder=folder)[0]
        found = matrix_of_checkpoints.whole_matrix(Path(folder), whole)
    return {pair: max(errors.values()) for pair, errors in found.items()}


def never_stopped(ranks: Ranks, folder: str) -> dict[str, Any]:
    """The run of one rank: a checkpoint of its middle in `folder`, and how it ended."""
    assert ranks.world_size == 1
    run = matrix_of_checkpoints.alone()
    run.train(0, matrix_of_checkpoints.MIDDLE)
    run.save(Path(folder) / "1")
    return run.ends()


def checkpoint_table(found: dict[tuple[str, str], float]) -> str:
    names = matrix_of_checkpoints.ALL
    head = [
        "| saved under \\ gone on under | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    return "\n".join(
        head
        + [
            f"| {source} | " + " | ".join(f"{found[source, name]:.1e}" for name in names) + " |"
            for source in names
        ]
    )


def write(text: str) -> None:
    """Put the tables between their marks in the page."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = ArgumentParser("python -m tests.matrix", description=__doc__)
    parser.add_argument("layouts", nargs="*", help="print these rows alone, and write nothing")
    some, names = parser.parse_args().layouts, list(FAMILIES)
    found = matrix(some or list(LAYOUTS), names)
    text, moved = page(found, names), {}
    if not some:
        write(text)
        moved = checkpoints()
        text += (
            f"\n\n## A checkpoint of any, under any other\n\n{MOVED}\n\n{checkpoint_table(moved)}"
        )
        write(text)
    print(text)
    held = all(passes(row, name, cell) for row in found for name, cell in found[row].items())
    return 0 if held and max(moved.values(), default=0.0) <= GATE else 1


if __name__ == "__main__":
    sys.exit(main())
