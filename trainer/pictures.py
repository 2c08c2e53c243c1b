"""The pictures of a run, as PNG files: its curves and its samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels = NDArray[np.uint8]

INK, QUIET, FAINT, PAPER = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"
BLUE, AMBER, RED = "#2f6f9f", "#b7791f", "#c0392b"
GAP = 2
MARGIN = 10
SMALLEST_TILE = 56
MAPS = 12  # layers in a picture of experts
PREFERRED = 3.0  # times an equal share: the end of its colours

_STYLE = {
    "font.size": 10,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "text.color": INK,
}


def loss_curve(metrics: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Loss (raw and smoothed) over the steps, gradient norm beneath, resumes and skips marked.

    metrics: lines of `metrics.jsonl`; `resumed` marks the first step of a process that resumed,
        `skipped` counts the steps left out so far

    Raises ValueError if there is no line to draw.
    """
    if not metrics:
        raise ValueError("no step has been logged, so there is no curve to draw")
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = np.array([m["step"] for m in metrics], dtype=np.float64)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 5.6), dpi=130, facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        loss = _column(metrics, "loss")
        _curve(top, steps, loss, BLUE, "loss")
        norm = _column(metrics, "grad_norm")
        _curve(bottom, steps, norm, AMBER, "gradient norm")
        bottom.set_xlabel("step")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        _logarithmic(bottom, norm)
        _marks((top, bottom), metrics)
        top.set_xlim(steps.min() - 0.5, steps.max() + 0.5)
        last = _smooth(loss)[-1]
        state = f"smoothed loss {last:.4f} at step {int(steps[-1]):,}"
        top.set_title(f"{title}    {state}", loc="left")
        top.legend(loc="upper right", edgecolor="none", framealpha=0.85)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def expert_map(load: NDArray[np.float64], path: Path, title: str) -> None:
    """One panel a layer: which share of the work each expert has, at each noise level.

    load: (layers, intervals of time, experts); at most MAPS layers are drawn, evenly spread
    Layers are numbered from 0. White is an equal share; blue is more, amber less, down to nothing and up to
    PREFERRED times as much.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
    from matplotlib.figure import Figure

    total = load.sum(-1, keepdims=True)
    share = np.where(total > 0, load / np.maximum(total, 1e-12), np.nan) * load.shape[-1]
    layers = np.unique(np.linspace(0, len(load) - 1, min(len(load), MAPS)).round().astype(int))
    columns = min(4, len(layers))
    rows = -(-len(layers) // columns)
    colors = LinearSegmentedColormap.from_list("use", [AMBER, PAPER, BLUE])
    norm = TwoSlopeNorm(1.0, 0.0, PREFERRED)
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        size = (2.6 * columns + 1.2, 2.4 * rows + 0.5)
        figure = Figure(figsize=size, dpi=130, facecolor=PAPER, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(layers) :]:
            axes.set_visible(False)
        for axes, layer in zip(grid.flat, layers, strict=False):
            extent = (0.0, 1.0, load.shape[-1] - 0.5, -0.5)
            drawn = axes.imshow(share[layer].T, colors, norm, aspect="auto", extent=extent)
            axes.set_title(f"layer {layer}", loc="left", fontsize=10)
            axes.yaxis.get_major_locator().set_params(integer=True)
        for axes in grid[-1]:
            axes.set_xlabel("noise    time    data")
        for axes in grid[:, 0]:
            axes.set_ylabel("expert")
        figure.colorbar(drawn, ax=grid, label="load over an equal share", ticks=[0, 0.5, 1, 2, 3])
        figure.suptitle(f"{title}    experts by noise level", x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def training_grids(history: Sequence[tuple[int, Tensor]], path: Path, columns: int) -> None:
    """One row of samples for each step of `history`, from first to last, behind its step."""
    rows = [_tiles(images[:columns]) for _, images in history]
    _save(_sheet(rows, left=[f"step {step:,}" for step, _ in history]), path)


def class_grid(
    images: Tensor, labels: Tensor, names: Sequence[str], path: Path, columns: int
) -> None:
    """One row a class: the first `columns` images that were asked to be of it, behind its name."""
    tiles = _tiles(images)
    asked = labels.tolist()
    shown = [i for i in range(len(names)) if i in asked]
    rows = [[t for t, label in zip(tiles, asked, strict=True) if label == i] for i in shown]
    _save(_sheet([row[:columns] for row in rows], left=[names[i] for i in shown]), path)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 of the same shape; what is not a number is black."""
    finite = torch.nan_to_num(images.detach().float().cpu(), nan=-1.0)
    return ((finite.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pixels(images: Tensor) -> Pixels:
    """(n, height, width, 3) bytes of images in [-1, 1]."""
    scaled = to_bytes(images)
    if scaled.shape[1] == 1:
        scaled = scaled.expand(-1, 3, -1, -1)
    pixels: Pixels = scaled.permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


def _tiles(images: Tensor) -> list[Image.Image]:
    """Pictures, small ones enlarged by a whole number: seen well, and no pixel is blurred."""
    pixels = to_pixels(images)
    factor = max(1, -(-SMALLEST_TILE // max(pixels.shape[1:3])))
    size = (pixels.shape[2] * factor, pixels.shape[1] * factor)
    return [Image.fromarray(p).resize(size, Image.Resampling.NEAREST) for p in pixels]


def _sheet(rows: Sequence[Sequence[Image.Image]], left: Sequence[str]) -> Image.Image:
    """Tiles in rows on white paper, with a name left of each row."""
    width, height = next((t.size for row in rows for t in row), (SMALLEST_TILE, SMALLEST_TILE))
    font = _font(max(11, min(16, height // 4)))
    start = 2 * MARGIN + max((int(font.getlength(name)) for name in left), default=0)
    pitch = height + GAP
    longest = max((len(row) for row in rows), default=0)
    size = (start + longest * (width + GAP) - GAP + MARGIN, 2 * MARGIN + len(rows) * pitch - GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        above = MARGIN + y * pitch
        middle = (start - MARGIN, above + height // 2)
        draw.text(middle, left[y], fill=INK, font=font, anchor="rm")
        for x, tile in enumerate(row):
            sheet.paste(tile, (start + x * (width + GAP), above))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, so that pictures look the same everywhere."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def _save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)


def _column(metrics: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """One number a line, nan where it is missing or not finite."""
    values = np.array([m.get(name, np.nan) for m in metrics], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over a window about each step, a fiftieth of the curve wide; nan counts for nothing."""
    kernel = np.hanning(2 * (len(values) // 50) + 3)
    good = np.isfinite(values)
    weight = np.convolve(good, kernel, mode="full")
    total = np.convolve(np.where(good, values, 0.0), kernel, mode="full")
    middle = slice(len(kernel) // 2, len(kernel) // 2 + len(values))
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = total[middle] / weight[middle]
    return mean


def _curve(
    axes: Any, steps: NDArray[np.float64], values: NDArray[np.float64], color: str, name: str
) -> None:
    """Raw values faint, their smooth mean strong."""
    # A few points make no line that could be seen.
    dot = "o" if len(values) < 20 else None
    axes.plot(
        steps,
        values,
        color=color,
        marker=dot,
        markersize=4,
        alpha=0.28,
        linewidth=0.8,
        label=f"{name}, each step",
    )
    axes.plot(steps, _smooth(values), color=color, linewidth=1.8, label=f"{name}, smoothed")
    axes.set_ylabel(name)


def _logarithmic(axes: Any, values: NDArray[np.float64]) -> None:
    """Logarithmic with plain numbers at its ticks, if all values allow it."""
    good = values[np.isfinite(values)]
    if not len(good) or good.min() <= 0:
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    decades = np.log10(good.max() / good.min())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _marks(axes: Sequence[Any], metrics: Sequence[Mapping[str, Any]]) -> None:
    """A dashed line where training was resumed, a red tick where a step was skipped."""
    resumed = [m["step"] for m in metrics if m.get("resumed")]
    counts = [m.get("skipped") or 0 for m in metrics]
    skipped = [
        m["step"] for m, old, new in zip(metrics, [0, *counts], counts, strict=False) if new > old
    ]
    for axis in axes:
        for i, step in enumerate(resumed):
            label = "resumed" if i == 0 else None
            axis.axvline(step, color=QUIET, linestyle=(0, (4, 3)), linewidth=1, label=label)
        if skipped:
            floor = axis.get_xaxis_transform()
            axis.plot(skipped, [0.0] * len(skipped), "|", color=RED, markersize=12, transform=floor,
                      label="skipped step", clip_on=False)  # fmt: skip
