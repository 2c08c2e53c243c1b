"""Pictures show the values they were given, where they belong."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from trainer.pictures import (
    GAP,
    MARGIN,
    SMALLEST_TILE,
    class_grid,
    expert_map,
    loss_curve,
    to_pixels,
    training_grids,
)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def test_minus_one_is_black_one_is_white_and_nothing_overflows() -> None:
    values = torch.tensor([-1.0, 1.0, 0.0, -7.0, 7.0, math.nan]).reshape(6, 1, 1, 1)
    pixels = to_pixels(values)
    assert pixels.shape == (6, 1, 1, 3)
    assert pixels[:, 0, 0, 0].tolist() == [0, 255, 128, 0, 255, 0]
    color = to_pixels(torch.tensor([1.0, 0.0, -1.0]).reshape(1, 3, 1, 1))
    assert color[0, 0, 0].tolist() == [255, 128, 0]


def test_a_grid_shows_every_image_enlarged_in_its_place(tmp_path: Path) -> None:
    shades = torch.linspace(-1, 1, 6)
    images = shades.reshape(6, 1, 1, 1).expand(6, 3, 8, 8)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    class_grid(images, labels, ["a", "b"], tmp_path / "deep" / "grid.png", columns=3)
    sheet = _pixels(tmp_path / "deep" / "grid.png")
    tile = SMALLEST_TILE
    assert sheet.shape[0] == 2 * MARGIN + 2 * tile + GAP
    bytes_ = to_pixels(images)[:, 0, 0]
    assert len(np.unique(bytes_)) == 6
    start = sheet.shape[1] - MARGIN - 3 * tile - 2 * GAP
    for i, shade in enumerate(bytes_):
        row, column = divmod(i, 3)
        y, x = MARGIN + row * (tile + GAP), start + column * (tile + GAP)
        assert np.all(sheet[y : y + tile, x : x + tile] == shade), i


def test_class_rows_hold_the_images_asked_for(tmp_path: Path) -> None:
    labels = torch.tensor([2, 0, 2, 2, 0])
    images = (labels.float() - 1).reshape(5, 1, 1, 1).expand(5, 1, 64, 64)
    class_grid(images, labels, ["low", "never", "high"], tmp_path / "class.png", columns=2)
    sheet = _pixels(tmp_path / "class.png")
    right = sheet[:, -MARGIN - 2 * 64 - GAP : -MARGIN]
    assert np.all(right[MARGIN : MARGIN + 64, :64] == 0)
    assert np.all(right[MARGIN + 64 + GAP : -MARGIN, 64 + GAP :] == 255)
    assert sheet.shape[0] == 2 * MARGIN + 2 * 64 + GAP
    assert sheet[:, : -MARGIN - 2 * 64 - GAP].min() < 100, "the names are written at the left"


def test_training_rows_follow_the_steps(tmp_path: Path) -> None:
    history = [(step, torch.full((4, 1, 56, 56), value)) for step, value in ((10, -1.0), (20, 0.0))]
    training_grids(history, tmp_path / "train.png", columns=3)
    sheet = _pixels(tmp_path / "train.png")
    column = sheet[:, -MARGIN - 30, 0]
    assert np.all(column[MARGIN : MARGIN + 56] == 0)
    assert np.all(column[MARGIN + 56 + GAP : -MARGIN] == 128)


def test_the_curve_falls_where_the_loss_falls_and_marks_resumes(tmp_path: Path) -> None:
    metrics = [
        {"step": s, "loss": 1.0 if s < 50 else 0.1, "grad_norm": 1.0 / s} for s in range(1, 101)
    ]
    metrics[30] |= {"loss": math.nan, "grad_norm": math.inf}
    loss_curve(metrics, tmp_path / "plain.png", "law")
    loss_curve([*metrics[:70], metrics[70] | {"resumed": True}, *metrics[71:]],
               tmp_path / "resumed.png", "law")  # fmt: skip
    plain, resumed = _pixels(tmp_path / "plain.png"), _pixels(tmp_path / "resumed.png")
    assert plain.shape == resumed.shape
    blue = np.argwhere((plain[..., 2] > plain[..., 0] + 80) & (plain[..., 2] > 140))
    early, late = blue[blue[:, 1] < 400], blue[blue[:, 1] > 900]
    late = late[late[:, 0] > 200]  # not the legend
    assert np.median(early[:, 0]) + 100 < np.median(late[:, 0])
    counted = [m | {"skipped": int(m["step"] > 30) + int(m["step"] > 60)} for m in metrics]
    loss_curve(counted, tmp_path / "skipped.png", "law")
    skipped = _pixels(tmp_path / "skipped.png")
    red = (skipped[..., 0] > 150) & (skipped[..., 1] < 100) & (skipped[..., 2] < 100)
    foot = red[300:].any(axis=0)  # under the legend
    ticks = np.count_nonzero(foot[1:] & ~foot[:-1])
    assert ticks == 2, "a tick where the count grew, not wherever it is above zero"
    changed = np.argwhere((plain != resumed).any(axis=2))
    # The dashed line stands at 70 % of the axis; the legend's new entry is elsewhere.
    assert np.any(np.abs(changed[:, 1] / plain.shape[1] - 0.72) < 0.03)


def test_an_empty_log_has_no_curve(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step"):
        loss_curve([], tmp_path / "none.png", "law")


def test_experts_by_noise_are_white_where_equal_and_coloured_where_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers: one where all experts do as much, one where the first does all of the noise."""
    load = np.ones((2, 10, 4))
    load[1, :5] = (4.0, 0.0, 0.0, 0.0)
    load[1, 9] = 0.0  # no sample was there: nothing is drawn
    saved: list[Figure] = []
    save = Figure.savefig

    def watched(figure: Figure, *args, **keys) -> None:
        saved.append(figure)
        save(figure, *args, **keys)

    monkeypatch.setattr(Figure, "savefig", watched)
    expert_map(load, tmp_path / "experts.png", "law")
    titles = [axes.get_title(loc="left") for axes in saved[0].axes]
    assert titles[:2] == ["layer 0", "layer 1"]
    pixels = _pixels(tmp_path / "experts.png")
    # Of the two panels, left of the colour bar.
    half = pixels.shape[1] * 9 // 20
    blue = (pixels[..., 2] - pixels[..., 0]) > 80
    amber = (pixels[..., 0] - pixels[..., 2]) > 80
    assert not blue[:, :half].any()
    assert not amber[:, :half].any()
    ratio = amber[:, half : 2 * half - 20].sum() / blue[:, half : 2 * half - 20].sum()
    assert ratio == pytest.approx(3.0, rel=0.15)
