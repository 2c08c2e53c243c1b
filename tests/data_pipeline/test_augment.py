"""What is seen of an image is decided by seed, place and size alone, and lies inside the image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.augment import (
    Augment,
    centre_region,
    centre_views,
    draw_views,
    random_region,
)

RANDOM = Augment("random", scale=(0.2, 0.9), aspect=(0.5, 2.0), flip=0.3)
sides = st.integers(1, 5000)


def views(count, augment=RANDOM, *, seed=3, first=0, size=(300, 500), target=(64, 64)):
    positions = torch.arange(first, first + count)
    return draw_views([size] * count, target, augment, seed=seed, positions=positions)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_a_view_does_not_depend_on_the_ranks(ranks):
    whole = views(100)
    parts = [
        views(100 * (rank + 1) // ranks - 100 * rank // ranks, first=100 * rank // ranks)
        for rank in range(ranks)
    ]
    assert np.array_equal(np.concatenate([part.region for part in parts]), whole.region)
    assert np.array_equal(np.concatenate([part.flip for part in parts]), whole.flip)
    other = views(100, seed=4)
    assert not np.array_equal(other.region, whole.region)
    assert not np.array_equal(other.flip, whole.flip)


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(sides, sides),
    target=st.tuples(st.integers(1, 1024), st.integers(1, 1024)),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    aspect=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    seed=st.integers(0, 99),
)
@example(size=(1, 1), target=(1, 1), scale=[1, 1], aspect=[1, 1], seed=0)
@example(size=(5000, 1), target=(64, 64), scale=[1, 1], aspect=[1, 1], seed=0)
def test_random_crops_keep_to_image_area_and_aspect(size, target, scale, aspect, seed):
    augment = Augment("random", tuple(scale), tuple(aspect), 0.0)
    region = views(20, augment, seed=seed, size=size, target=target).region.astype(float)
    top, left, height, width = region.T
    assert (np.stack([top, left]) >= 0).all()
    assert (np.stack([height, width]) >= 1).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    # Sides are rounded to whole pixels, at least one; where no allowed aspect fits the area, the
    # area is smaller and the aspect right.
    least_height, least_width = (np.where(side > 1, side - 0.5, 0) for side in (height, width))
    assert (least_height * least_width <= scale[1] * size[0] * size[1] * (1 + 1e-9)).all()
    shape = target[1] / target[0]
    assert (least_width <= aspect[1] * shape * (1 + 1e-9) * (height + 0.5)).all()
    assert (width + 0.5 >= aspect[0] * shape * (1 - 1e-9) * least_height).all()


def test_areas_aspects_and_places_are_spread_evenly():
    region = views(4000, size=(2000, 2000)).region.astype(float)
    top, left, height, width = region.T
    share = height * width / 4e6
    fits = share <= 0.5  # every aspect from 1/2 to 2 fits such an area
    for numbers, low, high in (
        (share, 0.2, 0.9),
        (np.log(width / height)[fits], math.log(0.5), math.log(2)),
        ((top + 0.5) / (2001 - height), 0, 1),
        ((left + 0.5) / (2001 - width), 0, 1),
    ):
        quantiles = np.quantile((numbers - low) / (high - low), [0.25, 0.5, 0.75])
        assert quantiles == pytest.approx([0.25, 0.5, 0.75], abs=0.04)


def test_a_crop_of_all_is_the_image():
    whole = Augment("random", (1.0, 1.0), (0.1, 10.0), 0.0)
    assert (views(10, whole, size=(37, 113)).region == (0, 0, 37, 113)).all()


def test_where_no_allowed_aspect_fits_the_best_one_is_taken_as_large_as_it_goes():
    augment = Augment("random", (0.9, 1.0), (1.0, 1.0), 0.0)
    for size in ((100, 400), (400, 100)):
        top, left, height, width = random_region(size, (8, 8), augment, (0.5, 0.5, 0.5, 0.5))
        assert (height, width) == (100, 100)
        assert (top, left) in {(0, 150), (150, 0)}


@pytest.mark.parametrize(
    ("size", "target", "region"),
    [
        ((8, 13), (8, 8), (0, 2, 8, 8)),
        ((13, 8), (4, 4), (2, 0, 8, 8)),
        ((100, 100), (32, 64), (25, 0, 50, 100)),
        ((100, 100), (64, 32), (0, 25, 100, 50)),
        ((1, 900), (64, 64), (0, 449, 1, 1)),
        ((900, 1), (8, 4096), (449, 0, 1, 1)),
    ],
)
def test_the_middle_is_the_largest_that_fits(size, target, region):
    assert centre_region(size, target) == region
    assert centre_views([size], target).region.tolist() == [list(region)]


def test_flips_belong_to_the_position():
    flips = views(10_000).flip
    assert abs(flips.mean() - 0.3) < 0.03
    assert (views(5000, first=5000).flip == flips[5000:]).all()
    for flip in (0.0, 1.0):
        augment = Augment("centre", (1.0, 1.0), (1.0, 1.0), flip)
        assert (views(1000, augment).flip == flip).all()
