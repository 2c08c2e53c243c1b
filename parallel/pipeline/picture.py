"""A timeline as a picture: a row for each rank, a box for each piece of work, gaps where it waits."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.pipeline.schedule import Work
from parallel.pipeline.timeline import Event, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, QUIET, GAP, PAPER = "#1f2933", "#7b8794", "#eceff2", "#ffffff"
# Of a microbatch in the first and in a later stage of a rank; the replica that runs up is hatched.
COLOURS = {
    Work.FORWARD: ("#3d7fb3", "#8fbbdb"),
    Work.BACKWARD: ("#3f8f63", "#96cba9"),
    Work.INPUT: ("#3f8f63", "#96cba9"),
    Work.WEIGHT: ("#b7791f", "#e3b873"),
}
NAMES = {
    Work.FORWARD: "forward",
    Work.BACKWARD: "backward",
    Work.INPUT: "backward: input",
    Work.WEIGHT: "backward: weight",
}
SYNC_COLOUR = "#c0392b"
# Numbers are left out where a box is narrower than this, in inches.
NARROWEST = 0.13


def draw(timeline: Timeline, path: Path) -> None:
    """Write the picture; the suffix of `path` says as what (.png or .svg)."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ranks = timeline.schedule.ranks
    shortest = min(
        event.end - event.start
        for row in timeline.events
        for event in row
        if event.end > event.start
    )
    width = min(max(9.0, 0.2 * timeline.makespan / shortest), 24.0)
    with mpl.rc_context(
        {"font.size": 10, "text.color": INK, "svg.hashsalt": "flowmill", "hatch.linewidth": 0.6}
    ):
        figure = Figure(
            figsize=(width, 1.3 + 0.42 * ranks), dpi=130, facecolor=PAPER, layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        scale = width * 0.93 / timeline.makespan
        for rank, row in enumerate(timeline.events):
            axes.barh(rank, timeline.makespan, height=0.84, color=GAP, zorder=0)
            for event in row:
                _box(axes, timeline, rank, event, scale)
        _frame(axes, timeline)
        figure.savefig(path, format=path.suffix[1:].lower(), metadata=_undated(path))


def _box(axes: "Axes", timeline: Timeline, rank: int, event: Event, scale: float) -> None:
    action, length = event.action, event.end - event.start
    if action.work is Work.SYNC:
        axes.plot(event.start, rank + 0.42, "^", color=SYNC_COLOUR, markersize=4, zorder=4)
        return
    if not length:
        return
    held = [stage for way, stage in timeline.schedule.local(rank) if way == action.direction]
    colour = COLOURS[action.work][min(held.index(action.stage), 1)]
    axes.barh(
        rank,
        length,
        left=event.start,
        height=0.84,
        color=colour,
        edgecolor=PAPER,
        linewidth=0.8,
        hatch="////" if action.direction else None,
        zorder=2,
    )
    if length * scale > NARROWEST:
        middle = event.start + length / 2
        text = axes.text(
            middle, rank, str(action.microbatch), ha="center", va="center", fontsize=7, zorder=3
        )
        if action.direction:
            text.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 0.9})


def _frame(axes: "Axes", timeline: Timeline) -> None:
    schedule = timeline.schedule
    axes.set_xlim(0, timeline.makespan)
    axes.set_ylim(schedule.ranks - 0.45, -0.55)
    axes.set_yticks(range(schedule.ranks), [f"rank {rank}" for rank in range(schedule.ranks)])
    axes.tick_params(colors=QUIET, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(timeline.title, loc="left")
    handles, names = _legend(timeline)
    axes.legend(
        handles,
        names,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.09),
        ncols=len(names),
        frameon=False,
    )


def _legend(timeline: Timeline) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = {event.action.work for row in timeline.events for event in row}
    handles: list[Any] = [Patch(color=COLOURS[work][0]) for work in COLOURS if work in used]
    names = [NAMES[work] for work in COLOURS if work in used]
    if timeline.schedule.stages > timeline.schedule.ranks:
        names[0] += " (lighter: a later stage)"
    handles.append(Patch(color=GAP))
    names.append("idle")
    if timeline.schedule.directions == 2:
        handles += [
            Patch(facecolor=COLOURS[Work.FORWARD][0], edgecolor=PAPER, hatch="////"),
            Line2D([], [], marker="^", color=SYNC_COLOUR, linestyle="none", markersize=4),
        ]
        names += ["the replica that runs up", "gradients added to the twin's"]
    return handles, names


def _undated(path: Path) -> dict[str, None] | None:
    """The same timeline gives the same file."""
    return {"Date": None} if path.suffix.lower() == ".svg" else None
