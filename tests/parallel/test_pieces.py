"""A run of elements is the boxes it says it is, and its first values are those of the whole."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flows.initialise import Rule
from parallel.initialise import fill_parameters
from parallel.pieces import Cut, FlatPiece, Slice, local_part


def piece_of(whole, start, length):
    return FlatPiece(whole.flatten()[start : start + length].clone(), whole.shape, start)


@st.composite
def cut(draw):
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    size = math.prod(shape)
    start = draw(st.integers(0, size))
    return shape, start, draw(st.integers(0, size - start))


@given(cut())
def test_boxes_are_the_elements_in_order(case):
    shape, start, length = case
    whole = torch.arange(math.prod(shape)).view(shape)
    piece = piece_of(whole, start, length)
    boxes = list(piece.boxes())
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    for offsets, box in boxes:
        place = tuple(slice(o, o + n) for o, n in zip(offsets, box.shape, strict=True))
        assert torch.equal(whole[place], box)
    found = [box.flatten() for _, box in boxes]
    assert torch.equal(torch.cat(found) if found else whole.new_empty(0), piece.local)


def test_boxes_are_views_that_loading_may_write():
    piece = piece_of(torch.zeros(4, 3), 2, 7)
    for _, box in piece.boxes():
        box.fill_(1.0)
    assert torch.equal(piece.local, torch.ones(7))
    assert torch.equal(local_part(piece), piece.local)
    copied = piece.detach().clone()
    copied.local.zero_()
    assert torch.equal(piece.local, torch.ones(7))


@pytest.mark.parametrize("rule", [Rule.normal(0.5), Rule.uniform(0.1), Rule.constant(3.0)])
def test_pieces_are_drawn_as_the_whole_is(rule):
    whole = torch.empty(5, 4, 3)
    fill_parameters({"w": whole}, {"w": rule}, seed=3)
    for start, end in itertools.pairwise([0, 1, 23, 23, 47, 60]):
        piece = piece_of(torch.zeros(5, 4, 3), start, end - start)
        fill_parameters({"w": piece}, {"w": rule}, seed=3)
        assert torch.equal(piece.local, whole.flatten()[start:end])


def shares_of(whole, dim, parts, index, count):
    """Share `index` of every stretch, one behind the other, as a rank would have them."""
    stretches = whole.split(parts, dim)
    return torch.cat([stretch.chunk(count, dim)[index] for stretch in stretches], dim).clone()


def slice_of(whole, dim, parts, index, count):
    cut = Cut(whole.shape, dim, parts, index, count, group=None)
    return Slice(shares_of(whole, dim, parts, index, count), cut)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("parts", [(12,), (4, 4, 4), (8, 4), (2, 2, 8)])
def test_slices_are_the_boxes_they_say_they_are(dim, parts):
    shape = (12, 3) if dim == 0 else (3, 12)
    whole = torch.arange(36.0).view(shape)
    covered = torch.zeros(shape)
    for index in range(2):
        piece = slice_of(whole, dim, parts, index, 2)
        assert piece.shape == whole.shape
        assert piece.local.shape == piece.cut.local_shape
        for offsets, box in piece.boxes():
            place = tuple(slice(o, o + n) for o, n in zip(offsets, box.shape, strict=True))
            assert torch.equal(whole[place], box)
            covered[place] += 1
            box.fill_(-1.0)
        assert (piece.local == -1.0).all()  # every element is in a box, which is a view
    assert (covered == 1).all()


@pytest.mark.parametrize("rule", [Rule.normal(0.5), Rule.uniform(0.1)])
def test_slices_are_drawn_as_the_whole_is(rule):
    whole = torch.empty(12, 4)
    fill_parameters({"w": whole}, {"w": rule}, seed=3)
    for dim, parts in ((0, (4, 8)), (1, (4,))):
        for index in range(2):
            piece = slice_of(torch.zeros(12, 4), dim, parts, index, 2)
            fill_parameters({"w": piece}, {"w": rule}, seed=3)
            assert torch.equal(piece.local, shares_of(whole, dim, parts, index, 2))
