"""Tokens are dealt out whole and once, and come back in order; travelling has the gradients it says."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallel import regions
from parallel.processes import Ranks
from parallel.regions import Deal
from tests.distributed.harness import run_ranks

DEALS = [((6,), 2, False), ((5,), 2, False), ((4, 6), 2, False), ((9,), 3, False), ((8,), 2, True)]
DEALS += [((7,), 2, True), ((12,), 3, True), ((1,), 2, True)]


@pytest.mark.parametrize(("parts", "count", "zigzag"), DEALS)
@pytest.mark.parametrize("dim", [1, 2, -1])
def test_dealt_tokens_come_back(parts, count, zigzag, dim):
    length = sum(parts)
    x = torch.arange(1.0, 2 * length * 3 + 1).view(2, length, 3).movedim(1, dim)
    deal = Deal(parts, 0, count, None, zigzag=zigzag)
    shares = deal.shares(x, dim)
    assert {share.shape[dim] for share in shares} == {sum(deal.local_parts)}
    assert torch.equal(deal.joined(shares, dim), x)
    # Every token is with one rank, and there is nothing else but zeros.
    together = torch.cat([share.flatten() for share in shares])
    assert torch.equal(together[together != 0].sort().values, x.flatten().sort().values)
    for rank, share in enumerate(shares):
        assert torch.equal(Deal(parts, rank, count, None, zigzag=zigzag).share(x, dim), share)


def test_a_rank_has_some_of_every_part_and_in_zigzag_both_ends():
    x = torch.arange(8)[None]
    assert Deal((2, 6), 1, 2, None).share(x).tolist() == [[1, 5, 6, 7]]
    assert Deal((8,), 0, 2, None, zigzag=True).share(x).tolist() == [[0, 1, 6, 7]]
    assert Deal((8,), 1, 2, None, zigzag=True).share(x).tolist() == [[2, 3, 4, 5]]
    assert Deal((7,), 1, 2, None).share(x[:, :7]).tolist() == [[4, 5, 6, 0]]


def travelled(ranks: Ranks) -> dict[str, Any]:
    """What each way does to its input and to a gradient; both differ from rank to rank."""
    group = dist.group.WORLD
    deal = Deal((2, 3), ranks.rank, 2, group, zigzag=False)
    whole = torch.arange(5.0).view(1, 5, 1) + 10 * ranks.rank
    own = deal.share(whole)
    ways = {
        "split": (whole, lambda x: regions.split(x, deal)),
        "gather": (own, lambda x: regions.gather(x, deal)),
        "gather_summed": (own, lambda x: regions.gather_summed(x, deal)),
        "scattered": (whole, lambda x: regions.scattered(x, deal)),
        "copied": (whole, lambda x: regions.copied(x, group)),
        "reduced": (whole, lambda x: regions.reduced(x, group)),
    }
    found = {}
    for name, (value, way) in ways.items():
        x = value.clone().requires_grad_()
        result = way(x)
        gradient = torch.arange(1.0, result.numel() + 1).view_as(result) + 100 * ranks.rank
        result.backward(gradient)
        found[name] = {"value": result.flatten().tolist(), "gradient": x.grad.flatten().tolist()}
    return found


def test_tokens_and_gradients_travel_as_they_say():
    zero, one = run_ranks(travelled, 2)
    # Of [0 1 | 2 3 4] rank 0 has 0, 2, 3 and rank 1 has 11, 14 (its numbers are 10 more) and padding.
    assert zero["split"]["value"] == [0, 2, 3]
    assert one["split"]["value"] == [11, 14, 0]
    for rank in (zero, one):
        assert rank["split"]["gradient"] == [1, 101, 2, 3, 102]  # everybody's, in order
        assert rank["gather"]["value"] == rank["gather_summed"]["value"] == [0, 11, 2, 3, 14]
        assert rank["copied"]["gradient"] == [102, 104, 106, 108, 110]  # the sum
        assert rank["reduced"]["value"] == [10, 12, 14, 16, 18]
        assert rank["scattered"]["gradient"] == [1, 101, 2, 3, 102]
    assert zero["gather"]["gradient"] == [1, 3, 4]  # its own
    assert one["gather"]["gradient"] == [102, 105, 0]
    assert zero["gather_summed"]["gradient"] == [102, 106, 108]  # the sum of its own
    assert one["gather_summed"]["gradient"] == [104, 110, 0]
    assert zero["scattered"]["value"] == [10, 14, 16]  # its own of the sum
    assert one["scattered"]["value"] == [12, 18, 0]
    assert zero["reduced"]["gradient"] == [1, 2, 3, 4, 5]
    assert zero["copied"]["value"] == [0, 1, 2, 3, 4]
