"""Weight decay shrinks matrices alone; the groups do not depend on the order of parameters."""

import copy

import pytest
import torch

from trainer import optimizers

SHAPES = {
    "blocks.0.attention.qkv.weight": (6, 4),
    "blocks.0.attention.qkv.bias": (6,),
    "patches.weight": (4, 3),
    "label.weight": (5, 4),
    "norm.gain": (4,),
}
DECAYED = {"blocks.0.attention.qkv.weight", "patches.weight"}


def parameters(order):
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(SHAPES[name], generator=generator) for name in sorted(SHAPES)}
    return {name: torch.nn.Parameter(values[name].clone()) for name in order}


def build(named, weight_decay=0.5, lr=0.1):
    return optimizers.build(
        named,
        lr=lr,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=weight_decay,
    )


def test_a_step_without_gradient_shrinks_matrices_alone():
    named = parameters(SHAPES)
    before = copy.deepcopy(named)
    optimizer = build(named)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in named.items():
        factor = 1 - 0.1 * 0.5 if name in DECAYED else 1.0
        torch.testing.assert_close(parameter, before[name] * factor, rtol=1e-6, atol=0)


def test_groups_do_not_depend_on_the_order_of_parameters():
    forwards = build(parameters(SHAPES))
    backwards = build(parameters(reversed(SHAPES)))
    assert forwards.param_groups[0]["fused"]
    for one, other in zip(forwards.param_groups, backwards.param_groups, strict=True):
        assert one["name"] == other["name"]
        assert one["names"] == other["names"] == sorted(one["names"])
    assert set(forwards.param_groups[0]["names"]) == DECAYED


def test_steps_are_those_of_adamw_written_out():
    """Loshchilov and Hutter 2019, algorithm 2, two steps by hand in float64."""
    named = parameters(SHAPES)
    name = "patches.weight"
    optimizer = build(named)
    weight = named[name].detach().double().clone()
    first = torch.zeros_like(weight)
    second = torch.zeros_like(weight)
    for step in (1, 2):
        gradient = torch.full_like(named[name], 0.3 * step).requires_grad_(False)
        gradient[0, 0] = -1.0
        named[name].grad = gradient
        optimizer.step()
        g = gradient.double()
        first = 0.9 * first + 0.1 * g
        second = 0.99 * second + 0.01 * g * g
        corrected = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        weight = weight * (1 - 0.1 * 0.5) - 0.1 * corrected
    torch.testing.assert_close(named[name].double(), weight, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_fused_on_cuda():
    device = torch.device("cuda")
    named = {"w": torch.nn.Parameter(torch.ones(3, 3, device=device))}
    optimizer = optimizers.build(named, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    named["w"].grad = torch.ones_like(named["w"])
    optimizer.step()
    torch.testing.assert_close(named["w"].cpu(), torch.full((3, 3), 0.9))
