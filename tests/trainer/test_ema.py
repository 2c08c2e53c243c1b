"""An average is the recurrence it is named for, in place, on shards, and gives the weights back."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed.harness import run_ranks
from trainer.ema import Ema, decay_at


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.nn.Parameter(torch.randn(5, 3, generator=generator)),
        "b": torch.nn.Parameter(torch.randn(4, generator=generator)),
        "scale": torch.nn.Parameter(torch.randn((), generator=generator)),
    }


def test_the_decay_warms_up_to_its_value():
    steps = range(100_000)
    decays = [decay_at(0.999, step) for step in steps[::97]]
    assert decay_at(0.999, 0) == pytest.approx(0.1)
    assert decays == sorted(decays)
    assert decays[-1] == 0.999
    assert all(decay_at(0.05, step) == 0.05 for step in range(5))


def test_updates_are_the_recurrence_in_float64():
    named = parameters()
    ema = Ema(named, [0.9, 0.5])
    expected = {
        decay: {name: p.detach().double() for name, p in named.items()} for decay in (0.9, 0.5)
    }
    for step in range(20):
        with torch.no_grad():
            for parameter in named.values():
                parameter.add_(0.1 * (step + 1))
        ema.update(named, torch.tensor(0.0), step)
        for decay, averages in expected.items():
            d = min(decay, (1 + step) / (10 + step))
            for name in averages:
                averages[name] = d * averages[name] + (1 - d) * named[name].detach().double()
    for decay, averages in expected.items():
        for name, average in averages.items():
            found = ema.tensors()[f"{decay}.{name}"]
            torch.testing.assert_close(found.double(), average, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_leaves_averages_bitwise_as_they_were():
    named = parameters()
    ema = Ema(named, [0.9])
    before = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    with torch.no_grad():
        named["w"].add_(1.0)
    ema.update(named, torch.tensor(1), 5)
    assert all(torch.equal(before[name], tensor) for name, tensor in ema.tensors().items())
    ema.update(named, torch.tensor(0), 5)
    assert not torch.equal(before["0.9.w"], ema.tensors()["0.9.w"])


def test_applied_gives_everything_back_also_after_an_exception():
    named = parameters()
    ema = Ema(parameters(1), [0.9])
    weights = {name: p.detach().clone() for name, p in named.items()}
    averages = {name: tensor.clone() for name, tensor in ema.tensors().items()}
    storages = {name: p.data_ptr() for name, p in named.items()}

    def sample_and_fail():
        with ema.applied(named, 0.9):
            assert all(torch.equal(named[name], averages[f"0.9.{name}"]) for name in named)
            with pytest.raises(RuntimeError, match="leave `applied`"):
                ema.tensors()
            with pytest.raises(RuntimeError, match="leave `applied`"):
                ema.update(named, torch.tensor(0), 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sample_and_fail()
    assert all(torch.equal(named[name], weights[name]) for name in named)
    assert all(torch.equal(ema.tensors()[name], averages[name]) for name in averages)
    assert all(named[name].data_ptr() == storages[name] for name in named)


def test_half_precision_weights_are_refused():
    with pytest.raises(ValueError, match=r"average of w in torch\.bfloat16"):
        Ema({"w": torch.zeros(2, dtype=torch.bfloat16)}, [0.9])


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3))


def averaged(model, shard):
    """Ten updates of an average; the network's output with it, and the average whole."""
    if shard:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    named = dict(model.named_parameters())
    ema = Ema(named, [0.9])
    for step in range(10):
        with torch.no_grad():
            for parameter in named.values():
                parameter.mul_(1.1)
        ema.update(named, torch.tensor(float(step == 3)), step)
    inputs = torch.ones(2, 3)
    with ema.applied(named, 0.9), torch.no_grad():
        outputs = model(inputs)
        if shard:
            model.reshard()
    with torch.no_grad():
        after = model(inputs)
    whole = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in ema.tensors().items()
    }
    local = sum(t.to_local().numel() for t in ema.tensors().values()) if shard else 0
    return outputs, after, whole, local


def ranks_average(ranks):
    expected = averaged(make_model(), shard=False)
    found = averaged(make_model(), shard=True)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert not torch.equal(found[0], found[1])
    assert all(torch.equal(found[2][name], expected[2][name]) for name in expected[2])
    total = torch.tensor(found[3])
    dist.all_reduce(total)
    assert total == sum(tensor.numel() for tensor in expected[2].values())
    return True


def test_a_sharded_average_is_the_single_device_one_and_no_rank_holds_it_whole():
    assert run_ranks(ranks_average, 2) == [True, True]


@pytest.mark.gpu
def test_updates_on_cuda_do_not_wait_for_the_device():
    named = {name: p.detach().cuda() for name, p in parameters().items()}
    ema = Ema(named, [0.9])
    skip = torch.zeros((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ema.update(named, skip, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
