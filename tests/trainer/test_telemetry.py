"""The numbers of a step: what they mean, that every rank reads the same, that they come one late."""

import pytest
import torch
from torch import Tensor

from data_pipeline.faults import Budget
from flows.errors import UserError
from parallel.engines.engine import StepResult
from trainer.routing import RoutingSums
from trainer.telemetry import BUCKETS, TRACE, Telemetry

CPU = torch.device("cpu")
HOST = {"lr": 0.1, "data_wait_seconds": 0.0}


def telemetry(**changes):
    values = {"batch": 4, "flops": 10, "world_size": 1, "max_skipped": 2, "device": CPU}
    values["precision"] = "fp32"
    return Telemetry(**(values | {"budget": Budget(0.25, 12)} | changes))


def push(
    meter,
    step,
    *,
    loss=(1.0,),
    time=(0.5,),
    skip=0.0,
    stop=False,
    bad=0,
    others=None,
    peers_stop=0,
    routing=None,
):
    """One step; `others` is what the other ranks' numbers add up to."""

    def sum_over_data(mine: Tensor) -> Tensor:
        return mine if others is None else mine + others

    meter.push(
        step,
        StepResult(torch.tensor(loss), None if time is None else torch.tensor(time)),
        norm=torch.tensor(2.5),
        skip=torch.tensor(skip),
        stop=stop,
        bad=bad,
        host=HOST,
        sum_over_data=sum_over_data,
        sum_over_peers=lambda mine: mine + peers_stop,
        routing=routing,
    )
    return list(meter.lines())


def numbers_of(loss, time, stop, bad=0):
    """What one rank sends on its way, taken from a meter of its own."""
    sent = []
    telemetry().push(
        0,
        StepResult(torch.tensor(loss), torch.tensor(time)),
        norm=torch.zeros(()),
        skip=torch.zeros(()),
        stop=stop,
        bad=bad,
        host={},
        sum_over_data=lambda mine: sent.append(mine) or mine,
        sum_over_peers=lambda mine: mine,
    )
    return sent[0]


def test_one_who_shares_samples_and_is_asked_to_stop_stops_all():
    meter = telemetry()
    push(meter, 0, peers_stop=1)
    push(meter, 1)
    assert meter.stop_agreed


def test_a_step_is_told_while_the_next_one_runs_and_the_last_when_asked():
    meter = telemetry()
    assert push(meter, 0) == []
    assert [line["step"] for line in push(meter, 1)] == [1]
    assert [line["step"] for line in push(meter, 2)] == [2]
    assert [line["step"] for line in meter.lines(everything=True)] == [3]
    assert list(meter.lines(everything=True)) == []


def test_the_loss_is_the_mean_over_all_samples_of_all_ranks():
    others = numbers_of((5.0, 6.0, 7.0), (0.1, 0.2, 0.95), False)
    meter = telemetry()
    push(meter, 0, loss=(2.0,), time=(0.15,), others=others)
    (line,) = meter.lines(everything=True)
    assert line["loss"] == 5.0
    assert line["grad_norm"] == 2.5
    assert line["loss_by_time"] == [None, 3.5, 6.0, *[None] * 6, 7.0]
    assert line["lr"] == 0.1


def test_times_at_the_ends_and_times_unknown():
    meter = telemetry()
    push(meter, 0, loss=(1.0, 2.0), time=(0.0, 1.0))
    (line,) = meter.lines(everything=True)
    assert line["loss_by_time"] == [1.0, *[None] * (BUCKETS - 2), 2.0]
    push(meter, 1, time=None)
    (line,) = meter.lines(everything=True)
    assert line["loss_by_time"] == [None] * BUCKETS


def test_one_rank_asked_to_stop_is_read_by_all_at_the_same_step():
    others = numbers_of((1.0,), (0.5,), True)
    meter = telemetry()
    push(meter, 0)
    push(meter, 1, others=others)
    assert not meter.stop_agreed
    push(meter, 2)
    assert meter.stop_agreed
    push(meter, 3)
    push(meter, 4)
    assert meter.stop_agreed, "a request is not forgotten"


def test_skipped_steps_are_counted_over_the_whole_run():
    meter = telemetry()
    for step, skip in enumerate([1.0, 0.0, 1.0, 1.0, 0.0]):
        push(meter, step, skip=skip)
    list(meter.lines(everything=True))
    assert meter.skipped == 3
    resumed = telemetry()
    resumed.load_state_dict(meter.state_dict())
    push(resumed, 5, skip=1.0)
    assert [line["skipped"] for line in resumed.lines(everything=True)] == [4]


def test_too_many_skipped_in_a_row_are_one_sentence_also_when_a_checkpoint_asks():
    meter = telemetry()
    for step in range(3):
        push(meter, step, skip=1.0)
    with pytest.raises(UserError, match=r"^step 3: the gradient was not finite 3 steps in a row; "):
        list(meter.lines(everything=True))


@pytest.mark.parametrize(("precision", "advised"), [("fp32", False), ("bf16", True)])
def test_full_precision_is_advised_where_it_is_not_there(precision, advised):
    meter = telemetry(max_skipped=0, precision=precision)
    push(meter, 0, skip=1.0)
    with pytest.raises(UserError, match=r"optimizer\.clip.*, and run again\.$") as refusal:
        list(meter.lines(everything=True))
    assert ("train.precision=fp32" in str(refusal.value)) == advised


def test_the_routing_of_a_skipped_step_is_told_and_counted_nowhere():
    meter = telemetry()
    load = torch.arange(2 * BUCKETS * 4.0).view(2, BUCKETS, 4)
    numbers = [torch.ones(2) for _ in range(3)]
    sums = RoutingSums(load, *numbers, flow=torch.ones(2, 4, 4))
    lines = []
    for step, skip in enumerate([0.0, 1.0]):
        lines += push(meter, step, skip=skip, routing=sums)
    lines += meter.lines(everything=True)
    assert [TRACE in line for line in lines] == [True, False]
    assert ["experts" in line for line in lines] == [True, True]
    assert torch.equal(meter.experts.table, load.double())


def test_bad_samples_of_all_ranks_count_and_their_budget_is_an_epochs_one():
    others = numbers_of((1.0,), (0.5,), False, bad=2)
    meter = telemetry()
    push(meter, 0, bad=1, others=others)
    assert [line["bad_samples"] for line in push(meter, 1)] == [3]
    # Steps of four samples, epochs of twelve: three of these are allowed each.
    resumed = telemetry()
    resumed.load_state_dict(meter.state_dict())
    push(resumed, 3, bad=1, others=others)
    assert [line["bad_samples"] for line in resumed.lines(everything=True)] == [6]
    push(resumed, 4, bad=1)
    with pytest.raises(UserError, match=r"4 bad samples in this epoch of 12, .* allows 3; "):
        list(resumed.lines(everything=True))
    spent = telemetry()
    spent.load_state_dict(meter.state_dict())
    push(spent, 2, bad=1)
    with pytest.raises(UserError, match="4 bad samples in this epoch"):
        list(spent.lines(everything=True))


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_told_as_it_is(loss):
    meter = telemetry()
    push(meter, 0, loss=(1.0, loss), time=(0.05, 0.15), skip=1.0)
    (line,) = meter.lines(everything=True)
    assert str(line["loss"]) == str(loss)
    assert line["skipped"] == 1


def test_rates_are_of_the_whole_batch_and_a_pause_does_not_count(monkeypatch):
    now = iter([100.0, 100.5, 110.0, 110.25])
    monkeypatch.setattr("trainer.telemetry.time.perf_counter", lambda: next(now))
    meter = telemetry()
    push(meter, 0)
    meter.restart_clock()
    (first,) = push(meter, 1)
    (second,) = meter.lines(everything=True)
    assert (first["step_seconds"], first["samples_per_second"]) == (0.5, 8.0)
    assert (second["step_seconds"], second["samples_per_second"]) == (0.25, 16.0)
