"""Meters tell the truth about a step and never make it wait."""

import math
import time

import pytest
import torch

from trainer.meters import Readout, mfu, peak_bf16_flops


def test_a_reading_is_the_step_before_and_keeps_full_precision() -> None:
    readout = Readout()
    values = [torch.tensor(x, dtype=torch.float32) for x in (0.1, math.nan, 1e-30)]
    assert readout.take() is None
    assert readout.put(1, {"loss": values[0], "norm": values[2]}) is None
    first = readout.put(2, {"loss": values[1], "row": torch.arange(3), "one": torch.ones(1)})
    assert first is not None
    assert (first.step, first.rows) == (1, {})
    assert first.scalars == {"loss": values[0].item(), "norm": values[2].item()}
    second = readout.take()
    assert second is not None
    assert (second.step, second.rows) == (2, {"row": (0.0, 1.0, 2.0), "one": (1.0,)})
    assert math.isnan(second.scalars["loss"])
    assert readout.take() is None


def test_a_held_number_does_not_change_with_its_tensor() -> None:
    readout, norm = Readout(), torch.ones((), dtype=torch.float64)
    readout.put(1, {"norm": norm})
    norm.add_(1)
    reading = readout.take()
    assert reading is not None
    assert reading.scalars["norm"] == 1.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_a_peak_is_known_or_unknown_but_never_guessed(name: str, peak: float | None) -> None:
    assert peak_bf16_flops(name) == peak


def test_mfu_is_needed_over_possible() -> None:
    assert mfu(6e9, 1000.0, 1e12, 8) == 0.75
    assert mfu(6e9, 1000.0, None, 8) is None


@pytest.mark.gpu
def test_reading_behind_a_busy_device_does_not_wait() -> None:
    device = torch.device("cuda")
    readout, work = Readout(), torch.randn(4096, 4096, device=device)
    readout.put(0, {"warm": work.sum()})
    readout.take()
    before = time.perf_counter()
    for _ in range(50):
        work = torch.nn.functional.normalize(work @ work)
    readout.put(1, {"loss": work.sum()})
    queued = time.perf_counter() - before
    reading = readout.take()
    waited = time.perf_counter() - before
    assert queued < waited / 2
    assert reading is not None
    assert reading.scalars["loss"] == work.sum().item()


@pytest.mark.gpu
def test_holding_a_number_needs_no_synchronisation() -> None:
    readout, loss = Readout(), torch.rand(64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        readout.put(1, {"loss": loss.mean(), "row": loss})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reading = readout.take()
    assert reading is not None
    assert reading.rows["row"] == tuple(loss.tolist())
