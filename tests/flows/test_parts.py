"""Parts that model families share."""

import torch

from flows.batch import Batch
from flows.models.norms import RMSNorm
from flows.models.rotary import axis_angles, rotate, turns


def test_rotation_turns_adjacent_pairs_and_keeps_their_length():
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    angles = axis_angles(torch.arange(5), 4)
    turned = rotate(x, turns(angles))
    as_complex = torch.view_as_complex(x.double().unflatten(-1, (4, 2)).contiguous())
    expected = torch.view_as_real(as_complex * torch.polar(torch.ones_like(angles), angles))
    torch.testing.assert_close(turned, expected.flatten(-2).float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(turned[..., 0, :], x[..., 0, :])


def test_rotation_takes_features_that_do_not_lie_side_by_side():
    x = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    turn = turns(axis_angles(torch.arange(5), 4))
    assert torch.equal(rotate(x, turn), rotate(x.contiguous(), turn))


def test_products_of_turned_vectors_depend_on_their_distance_alone():
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(8, generator=generator).expand(6, 8) for _ in range(2))
    turn = turns(axis_angles(torch.arange(6), 4))
    products = rotate(query, turn) @ rotate(key, turn).T
    for distance in range(-4, 5):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)


def test_rms_norm_stores_its_weight_as_a_distance_from_the_offset():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)) * 7
    norm = RMSNorm(6, offset=1.0)
    torch.nn.init.zeros_(norm.weight)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(4), atol=1e-5, rtol=1e-5)


def test_a_batch_is_cut_with_all_that_belongs_to_its_samples():
    batch = Batch(
        torch.arange(5.0).view(5, 1, 1, 1), torch.arange(5), torch.arange(5) + 100,
        {"text": torch.arange(10).view(5, 2)},
    )  # fmt: skip
    first, second, third = batch.split(2)
    assert third.extras["text"].tolist() == [[8, 9]]
    assert torch.cat([b.position for b in (first, second, third)]).tolist() == [*range(100, 105)]
