"""Meters tell the truth about a step and never make it wait."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.meters import (
    Readout,
    Throughput,
    TimeBuckets,
    bucket_means,
    mfu,
    peak_bf16_flops,
)

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


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


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-5, 5, width=32)), min_size=1, max_size=30))
def test_buckets_hold_the_mean_loss_of_their_times(samples: list[tuple[float, float]]) -> None:
    times, losses = (torch.tensor(x, dtype=torch.float64) for x in zip(*samples, strict=True))
    buckets = TimeBuckets(10, CPU)
    for part in (slice(0, 7), slice(7, None)):
        buckets.add(times[part], losses[part])
    readout = Readout()
    readout.put(1, buckets.drain(lambda values: values))
    reading = readout.take()
    assert reading is not None
    means = bucket_means(reading)
    by_bucket: dict[int, list[float]] = {}
    for t, loss in samples:
        by_bucket.setdefault(min(int(t * 10), 9), []).append(loss)
    assert len(means) == len(by_bucket)
    for i, values in by_bucket.items():
        name = f"loss_by_time/{i / 10:.4g}-{(i + 1) / 10:.4g}"
        assert means[name] == pytest.approx(sum(values) / len(values), rel=1e-12, abs=1e-12)


def test_buckets_skip_what_is_not_finite_and_start_again() -> None:
    buckets = TimeBuckets(4, CPU)
    buckets.add(torch.tensor([0.1, 0.1, 0.9]), torch.tensor([math.nan, 2.0, math.inf]))
    seen: list[Tensor] = []

    def doubled(values: Tensor) -> Tensor:
        seen.append(values)
        return values * 2

    drained = buckets.drain(doubled)
    assert drained["time_loss_sum"].tolist() == [4.0, 0, 0, 0]
    assert drained["time_loss_count"].tolist() == [2.0, 0, 0, 0]
    assert len(seen) == 1
    assert buckets.drain(doubled)["time_loss_count"].sum() == 0


def test_throughput_forgets_what_left_its_window() -> None:
    meter = Throughput(batch=8, total_steps=10, window=2)
    assert math.isnan(meter.samples_per_second)
    assert math.isnan(meter.eta_seconds)
    meter.update(1, 100.0)
    meter.update(2, 1.0)
    meter.update(3, 3.0)
    assert meter.samples_per_second == 4.0
    assert meter.eta_seconds == 14.0
    meter.update(10, 3.0)
    assert meter.eta_seconds == 0.0


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
@needs_cuda
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
@needs_cuda
def test_buckets_need_no_synchronisation() -> None:
    device = torch.device("cuda")
    buckets, readout = TimeBuckets(10, device), Readout()
    times, losses = torch.rand(64, device=device), torch.rand(64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        buckets.add(times, losses)
        readout.put(1, buckets.drain(lambda values: values))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reading = readout.take()
    assert reading is not None
    assert sum(reading.rows["time_loss_count"]) == 64
