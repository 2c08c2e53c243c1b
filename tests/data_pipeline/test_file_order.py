"""Samples in file order are the first ones of the files, each once."""

import pytest
import torch

from data_pipeline.file_order import read_all
from tests.data_pipeline.test_loader import decoder


@pytest.mark.parametrize("limit", [None, 1, 7, 100])
def test_held_out_samples_come_in_file_order(shards, limit):
    images, labels = read_all(
        [shards([4, 0, 5])], decoder(), size=(4, 4), keep={}, classes=10, limit=limit, batch=3
    )
    count = min(9, limit or 9)
    assert images.shape == (count, 1, 4, 4)
    assert labels.tolist() == list(range(count))


def test_held_out_digits_are_not_trained_on():
    def pixels(split):
        images, _ = read_all(
            [f"embedded:digits28/{split}-000000.tar"],
            decoder(),
            size=(28, 28),
            keep={},
            classes=10,
            limit=500,
            batch=64,
        )
        return images.flatten(1)

    assert torch.cdist(pixels("train"), pixels("heldout")).min() > 1
