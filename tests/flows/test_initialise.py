"""Initial weights depend on (seed, name, element) alone: any cut of a parameter fits the whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flows import initialise as module
from flows.initialise import Rule, fill_, initialise, xavier_uniform

RULES = [Rule.normal(0.02), Rule.uniform(0.3), Rule.constant(1.5)]


def piece(rule, global_shape, offset, shape, *, seed=5, name="blocks.0.weight"):
    tensor = torch.full(shape, math.nan)
    fill_(tensor, rule, seed=seed, name=name, global_shape=global_shape, offset=offset)
    return tensor


def whole(rule, shape, **key):
    return piece(rule, shape, (0,) * len(shape), shape, **key)


@st.composite
def boxes(draw):
    """A shape of up to three dimensions and a box in it, often empty or uneven."""
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return shape, ends


@settings(max_examples=150, deadline=None)
@given(box=boxes(), rule=st.sampled_from(RULES))
def test_any_box_is_a_piece_of_the_whole(box, rule):
    shape, ends = box
    cut = piece(rule, shape, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
    assert torch.equal(cut, whole(rule, shape)[tuple(slice(a, b) for a, b in ends)])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 50])
def test_shards_of_all_ranks_make_the_whole(rule, dim, ranks):
    """Cut as `torch.chunk` cuts: uneven, and empty for the last ranks."""
    shape = (37, 26)
    size = -(-shape[dim] // ranks)
    shards = []
    for rank in range(ranks):
        start = min(rank * size, shape[dim])
        local, offset = list(shape), [0, 0]
        local[dim], offset[dim] = min(size, shape[dim] - start), start
        shards.append(piece(rule, shape, tuple(offset), tuple(local)))
    assert torch.equal(torch.cat(shards, dim), whole(rule, shape))


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_the_chunk_size_does_not_matter(chunk, monkeypatch):
    expected = [whole(Rule.normal(1.0), shape) for shape in ((19, 31), (1, 300), (300,))]
    cut = piece(Rule.normal(1.0), (19, 31), (3, 5), (12, 11))
    monkeypatch.setattr(module, "CHUNK", {"cpu": chunk})
    for tensor in expected:
        assert torch.equal(whole(Rule.normal(1.0), tuple(tensor.shape)), tensor)
    assert torch.equal(piece(Rule.normal(1.0), (19, 31), (3, 5), (12, 11)), cut)


def test_a_transposed_piece_holds_the_same_values():
    tensor = torch.empty(7, 5).t()
    rule = Rule.normal(1.0)
    fill_(tensor, rule, seed=5, name="blocks.0.weight", global_shape=(5, 7), offset=(0, 0))
    assert torch.equal(tensor, whole(rule, (5, 7)))


def test_low_precision_is_the_rounded_float32():
    tensor = torch.empty(8, 9, dtype=torch.bfloat16)
    rule = Rule.normal(1.0)
    fill_(tensor, rule, seed=5, name="blocks.0.weight", global_shape=(8, 9), offset=(0, 0))
    assert torch.equal(tensor, whole(rule, (8, 9)).to(torch.bfloat16))


def test_distributions():
    normal = whole(Rule.normal(0.02), (300, 300))
    assert abs(normal.mean()) < 4 * 0.02 / 300
    assert abs(normal.std() / 0.02 - 1) < 4 / math.sqrt(2 * 90_000)
    uniform = whole(xavier_uniform(100, 500), (300, 300))
    assert 0.0999 < uniform.abs().max() < 0.1
    assert abs(uniform.std() / math.sqrt(2 / 600) - 1) < 0.01
    assert whole(Rule.constant(0.0), (3, 4)).count_nonzero() == 0


def test_seed_and_name_key_the_numbers():
    rule = Rule.normal(1.0)
    first = whole(rule, (40, 40))
    for other in (whole(rule, (40, 40), seed=6), whole(rule, (40, 40), name="blocks.1.weight")):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1]) < 0.1


def test_a_piece_outside_the_whole_is_refused():
    with pytest.raises(ValueError, match=r"blocks\.0\.weight.*leaves"):
        piece(Rule.normal(1.0), (4, 4), (2, 0), (3, 4))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2, bias=False)
        self.register_buffer("table", torch.full((5,), math.nan), persistent=False)
        self.rules = {
            "a.weight": xavier_uniform(3, 4),
            "a.bias": Rule.constant(0.0),
            "b.weight": Rule.normal(0.02),
        }

    def init_rules(self):
        return self.rules

    def reset_buffers(self):
        self.table.copy_(torch.arange(5))


def test_initialise_fills_everything_whatever_was_there():
    first, second = Tiny(), Tiny().to("meta").to_empty(device="cpu")
    for model in (first, second):
        initialise(model, seed=3)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad
    assert first.a.bias.count_nonzero() == 0
    assert torch.equal(first.b.weight, whole(Rule.normal(0.02), (2, 4), seed=3, name="b.weight"))
    assert first.table.tolist() == [0, 1, 2, 3, 4]


def test_rules_and_parameters_must_match():
    model = Tiny()
    del model.rules["a.bias"]
    with pytest.raises(ValueError, match=r"no rule for \['a.bias'\]"):
        initialise(model, seed=0)
    model = Tiny()
    model.rules["c.weight"] = Rule.constant(0.0)
    with pytest.raises(ValueError, match=r"no parameter for \['c.weight'\]"):
        initialise(model, seed=0)
