"""Attention of a sequence that ranks share is that of one device: outputs and gradients."""

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flows.models.attention import see_all, see_before
from parallel.attention_parts import Part, attend_part, join_, part_gradients
from parallel.processes import Ranks
from parallel.ring import inverse, ring_attention, ring_bytes, seen, zigzag, zigzag_order
from parallel.ulysses import ulysses_attention, ulysses_bytes
from tests.distributed.harness import run_ranks

# Sums of 16 float32 terms of size 1, in another order.
EXACT = 2e-6
# bfloat16 keeps 8 bits of values of size 1; parts are joined in float32.
BF16 = 2e-2

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 16, 8
CASES: dict[str, dict[str, Any]] = {
    "bidirectional": {},
    "causal": {"causal": True},
    "grouped": {"kv_heads": True},
    "grouped, causal": {"kv_heads": True, "causal": True},
    "masked": {"masked": True},
    "masked, grouped": {"masked": True, "kv_heads": True},
    "bf16": {"autocast": True},
    "bf16, causal": {"autocast": True, "causal": True},
}


def numbers(kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and the gradient of the output, laid out as projections leave them."""
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(BATCH, TOKENS, heads, WIDTH, generator=generator).transpose(1, 2)
        for heads in (HEADS, kv_heads, kv_heads, HEADS)
    )  # type: ignore[return-value]


def padding() -> Tensor:
    """(batch, 1, 1, tokens): with the contiguous cut, all keys of the second of two ranks, of one
    sample, are hidden."""
    mask = torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool)
    mask[0, ..., TOKENS // 2 :] = False
    mask[1, ..., 1:4] = False
    return mask


def differentiated(attend: Any, tensors: tuple[Tensor, ...], gradient: Tensor) -> list[Tensor]:
    """Output, and gradients of queries, keys and values."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


def compare(ranks: Ranks, way: str, causal=False, kv_heads=False, masked=False, autocast=False):
    """Largest difference of output and gradients between this rank's part and the whole's."""
    size, group = ranks.world_size, dist.group.WORLD
    *tensors, gradient = numbers(size if kv_heads else HEADS)
    mask = padding() if masked else None
    plain = see_before if causal else see_all
    expected = differentiated(lambda q, k, v: plain(q, k, v, mask), tuple(tensors), gradient)
    order = zigzag_order(TOKENS, size) if causal and way == "ring" else torch.arange(TOKENS)
    mine = order.view(size, -1)[ranks.rank]
    hidden = None if mask is None else mask[..., mine]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if way == "ring":
                return ring_attention(q, k, v, hidden, causal=causal, group=group)
            return ulysses_attention(q, k, v, hidden, kernel=plain, group=group)

    parts = tuple(tensor[:, :, mine] for tensor in tensors)
    found = differentiated(attend, parts, gradient[:, :, mine])
    return max(
        float((ours.float() - theirs[:, :, mine]).abs().max())
        for ours, theirs in zip(found, expected, strict=True)
    )


def on_ranks(ranks: Ranks) -> dict[str, Any]:
    """Errors of all cases, and bytes that a step of each way sends."""
    ways = ("ring", "ulysses")
    cases = [(way, name) for way in ways for name in CASES]
    return {
        "errors": {f"{way}: {name}": compare(ranks, way, **CASES[name]) for way, name in cases},
        "bytes": {way: bytes_sent(way, ranks.world_size) for way in ways},
    }


def bytes_sent(way: str, size: int) -> int:
    """As the backend was given them: queries of four heads, keys of four or fewer."""
    *tensors, gradient = (tensor[:, :, : TOKENS // size] for tensor in numbers(size))
    group = dist.group.WORLD

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if way == "ring":
            return ring_attention(q, k, v, None, causal=True, group=group)
        return ulysses_attention(q, k, v, None, kernel=see_before, group=group)

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen_by:
        differentiated(attend, tuple(tensors), gradient)
    total = 0
    for event in seen_by.events():
        sizes = 4 * math.prod(event.input_shapes[0]) if event.name.startswith("gloo:") else 0
        # Of what is exchanged, each rank keeps its own.
        kept = sizes // size if event.name == "gloo:all_to_all" else 0
        total += sizes - kept if event.name in ("gloo:send", "gloo:all_to_all") else 0
    return total


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[str, Any]]]:
    """Ranks -> of each rank, what `on_ranks` found."""
    return {size: run_ranks(on_ranks, size) for size in (2, 4)}


@pytest.mark.parametrize("size", [2, 4])
def test_shared_sequences_are_attended_as_whole_ones(found, size):
    for errors in (result["errors"] for result in found[size]):
        bounds = {name: BF16 if "bf16" in name else EXACT for name in errors}
        assert len(errors) == 2 * len(CASES)
        assert not {name: e for name, e in errors.items() if not e <= bounds[name]}


def test_it_did_compute_in_bfloat16(found):
    errors = found[2][0]["errors"]
    assert min(errors["ring: bf16"], errors["ulysses: bf16"]) > EXACT


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_send_what_the_formulas_say(found, size):
    of_head = BATCH * TOKENS // size * WIDTH
    for result in found[size]:
        assert result["bytes"] == {
            "ring": ring_bytes(size * of_head, 4, size),
            "ulysses": ulysses_bytes(HEADS * of_head, size * of_head, 4, size),
        }


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_parts_of_all_kernels_join_to_the_whole(causal, masked):
    """Those of the plain kernel, which a mask chooses, and those of the fused one."""
    query, key, value, gradient = numbers(2)
    mask = torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool) if masked else None
    plain = see_before if causal else see_all
    expected = differentiated(lambda q, k, v: plain(q, k, v, None), (query, key, value), gradient)
    whole = attend_part(query, key, value, mask, causal=causal)
    found = part_gradients(gradient, query, key, value, whole, mask, causal=causal)
    for ours, theirs in zip((whole.out, *found), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


def test_a_query_that_sees_nothing_adds_nothing():
    query, key, value, _ = numbers(HEADS)
    nothing = torch.zeros(BATCH, 1, 1, TOKENS, dtype=torch.bool)
    blind = attend_part(query, key, value, nothing, causal=False)
    assert not blind.out.any()
    assert (blind.lse == -torch.inf).all()
    part = attend_part(query, key, value, None, causal=False)
    for order in ((blind, part), (part, blind), (blind, part, blind)):
        out, lse = torch.zeros(query.shape), torch.full(query.shape[:3], -torch.inf)
        for each in order:
            join_(out, lse, each)
        assert torch.equal(out, part.out)
        assert torch.equal(lse, part.lse)
    found = part_gradients(query, query, key, value, Part(*blind), nothing, causal=False)
    assert not any(gradient.any() for gradient in found)


lengths = st.tuples(st.integers(1, 8), st.integers(1, 6))


@given(lengths)
def test_zigzag_is_an_order_of_all_tokens(lengths):
    size, chunk = lengths
    tokens = 2 * size * chunk
    order = zigzag_order(tokens, size)
    assert torch.equal(order.sort().values, torch.arange(tokens))
    assert torch.equal(order[inverse(order)], torch.arange(tokens))
    assert torch.equal(inverse(order)[order], torch.arange(tokens))
    assert torch.equal(torch.cat([zigzag(tokens, rank, size) for rank in range(size)]), order)


@given(lengths)
def test_zigzag_is_its_own_mirror_image(lengths):
    """A chain that is read backwards lies on the same ranks, each in its own order backwards."""
    size, chunk = lengths
    tokens = 2 * size * chunk
    for rank in range(size):
        places = zigzag(tokens, rank, size)
        assert torch.equal((tokens - 1 - places).flip(0), places)


@given(lengths)
def test_what_is_seen_is_what_lies_before_and_no_rank_has_more_of_it(lengths):
    size, chunk = lengths
    tokens, local = 2 * size * chunk, 2 * chunk
    visible, work = torch.zeros(tokens, tokens, dtype=torch.int64), []
    for rank in range(size):
        computed = 0
        for source in range(size):
            queries, keys, triangle = seen(rank, source, local, causal=True)
            rows, columns = zigzag(tokens, rank, size)[queries], zigzag(tokens, source, size)[keys]
            block = torch.ones(len(rows), len(columns), dtype=torch.int64)
            block = block.tril() if triangle else block
            visible[rows[:, None], columns] += block
            computed += int(block.sum())
        work.append(computed)
    assert torch.equal(visible, torch.ones(tokens, tokens, dtype=torch.int64).tril())
    assert len(set(work)) == 1
