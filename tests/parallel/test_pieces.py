"""A run of elements is the boxes it says it is, and its first values are those of the whole."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flows.initialise import Rule
from parallel.initialise import fill_parameters
from parallel.pieces import FlatPiece, local_part


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
