"""The search takes what is fastest and exact enough; the metrics are what their equations say."""

from dataclasses import replace

import pytest
import torch

from flows.samplers.inversion import SEQUENTIAL, Strategy, invert, prior
from flows.samplers.inversion_guidance import NO_GUIDANCE
from flows.samplers.inversion_metrics import difficulties
from flows.samplers.inversion_search import MARGIN, choose_strategy
from tests.flows.test_autoregressive_flows import (
    STARFLOW,
    TARFLOW,
    blocks_of,
    disturbed,
    fresh,
    inputs,
    read_at_once,
)
from tests.flows.test_inversion import LINEAR


@pytest.mark.parametrize("guidance", [NO_GUIDANCE, LINEAR])
def test_the_choice_is_never_slower_than_sequential_and_as_exact_as_asked(guidance) -> None:
    model, given = disturbed(STARFLOW), inputs(STARFLOW, batch=2)
    choices = choose_strategy(
        model, 2, text=given["text"], guidance=guidance, tolerance=1e-4, accuracy=1e-3
    )
    assert len(choices) == 3
    for choice in choices:
        assert choice.error <= 1e-3
        slowest = choice.sequential_seconds * MARGIN
        assert choice.strategy == SEQUENTIAL or choice.seconds <= slowest
    z = prior(model, 5, torch.arange(2))
    chosen = [choice.strategy for choice in choices]
    told = {"text": given["text"], "guidance": guidance}
    found = invert(model, z, **told, strategy=chosen, tolerance=1e-4)
    exact = invert(model, z, **told)
    assert (found.x - exact.x).square().mean().sqrt() < 5e-3 * exact.x.square().mean().sqrt()


def test_an_accuracy_that_no_iteration_has_leaves_sequential_sampling() -> None:
    model = disturbed(TARFLOW)
    choices = choose_strategy(model, 2, torch.zeros(2).long(), tolerance=1.0, accuracy=0.0)
    assert [choice.strategy for choice in choices] == [SEQUENTIAL] * 3


def test_a_flow_that_shifts_nothing_is_solved_in_one_call() -> None:
    """A fresh flow is the identity, and the guess of iterations its solution."""
    choices = choose_strategy(fresh(TARFLOW), 1, tolerance=0.0, accuracy=0.0)
    assert all(choice.strategy.group > 1 for choice in choices)
    z = prior(fresh(TARFLOW), 0, torch.arange(1))
    calls = invert(fresh(TARFLOW), z, strategy=Strategy(100)).calls
    assert calls == (1, 1, 1)


def test_what_a_clamp_does_to_samples_counts_against_iterating() -> None:
    choices = choose_strategy(fresh(TARFLOW), 1, tolerance=0.0, accuracy=1e-3, clamp=0.5)
    assert [choice.strategy for choice in choices] == [SEQUENTIAL] * 3


def test_the_guessing_metric_is_the_residual_of_one_update() -> None:
    model, given = disturbed(TARFLOW), inputs(TARFLOW)
    found = difficulties(model, model.tokens(given["x"]), given["label"], norm="frobenius")
    block, u = blocks_of(model)[0], model.tokens(given["x"])
    w, _ = block(u, given["label"])
    for guess, start in (("prior", w), ("zero", torch.zeros_like(w))):
        start = start.clone()
        start[:, 0] = w[:, 0]
        log_scale, shift = read_at_once(block, start[:, :-1], given["label"])
        residual = log_scale.exp() * w[:, 1:] + shift - u[:, 1:]
        # Block 0 is the last to be inverted.
        expected = residual.mean(0).norm().item()
        assert found[-1].guesses[guess] == pytest.approx(expected, rel=1e-4)


def test_the_ranking_metric_follows_the_output_weights() -> None:
    for config in (TARFLOW, replace(TARFLOW, volume_preserving=True)):
        model, given = disturbed(config), inputs(config)
        tokens = model.tokens(given["x"])
        before = difficulties(model, tokens, given["label"])
        assert sum(block.share for block in before) == pytest.approx(1.0)
        shift = blocks_of(model)[2].project_out.weight[-12:]
        spectral = torch.linalg.matrix_norm(shift, 2).item()
        if config.volume_preserving:
            assert before[0].convergence == pytest.approx(spectral, rel=1e-5)
        else:
            assert before[0].convergence > spectral
        blocks_of(model)[2].project_out.weight.data *= 10
        after = difficulties(model, tokens, given["label"])
        assert after[0].share > before[0].share
        assert after[2].convergence == pytest.approx(before[2].convergence)


def test_the_better_guess_is_the_one_with_the_smaller_residual() -> None:
    model, given = fresh(TARFLOW), inputs(TARFLOW)
    for block in difficulties(model, model.tokens(given["x"])):
        # Of the identity, the prior's token is the solution.
        assert block.guesses["prior"] <= 1e-6
        assert block.guess == "prior" or block.guesses["zero"] == block.guesses["prior"]
