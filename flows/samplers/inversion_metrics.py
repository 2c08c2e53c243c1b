"""How hard each block is to invert in parallel, measured on data: IGM and CRM.

Liu and Qin 2025, "Accelerate TarFlow Sampling with GS-Jacobi Iteration". Both look at a block's
forward pass u -> w on data, where the solution u of its inversion is known.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from flows.models.autoregressive import FlowBlock
from flows.samplers.inversion import AutoregressiveFlow, Chain, Guess, Told
from flows.samplers.inversion_guidance import NO_GUIDANCE

Norm = Literal["spectral", "one", "frobenius"]


@dataclass(frozen=True)
class Difficulty:
    """One block.

    guesses: initial guessing metric (IGM) of either guess: the norm of the batch's mean residual,
        a matrix (tokens, features), after one Jacobi update from the guess
    convergence: convergence ranking metric (CRM): |mean of u / s| |W_s| + |W_m|, with the rows of
        the output projection that make scale and shift
    share: of the sum of `convergence` over all blocks
    """

    guesses: dict[Guess, float]
    convergence: float
    share: float

    @property
    def guess(self) -> Guess:
        """The better guess."""
        return min(self.guesses, key=lambda guess: self.guesses[guess])


@torch.inference_mode()
def difficulties(
    model: AutoregressiveFlow,
    tokens: Tensor,
    label: Tensor | None = None,
    text: Tensor | None = None,
    *,
    norm: Norm = "spectral",
) -> list[Difficulty]:
    """Of every block, the top block (the first to be inverted) first.

    tokens: (batch, tokens, features) of data, `model.tokens(image)`
    """
    condition = model.condition(label, text, len(tokens), tokens.device)
    told = Told(condition, None, NO_GUIDANCE)
    u, found = tokens.float(), []
    for module in model.flow_blocks:
        block = cast(FlowBlock, module)
        w, _ = block(u, condition)
        guesses = {guess: _residual(block, u, w, told, guess, norm) for guess in GUESSES}
        found.append((guesses, _convergence(block, u, told, norm)))
        u = w
    total = sum(convergence for _, convergence in found)
    # The blocks of a fresh flow are all equally easy.
    return [
        Difficulty(guesses, crm, crm / total if total else 1 / len(found))
        for guesses, crm in reversed(found)
    ]


GUESSES: tuple[Guess, ...] = ("prior", "zero")


def _residual(
    block: FlowBlock, u: Tensor, w: Tensor, told: Told, guess: Guess, norm: Norm
) -> float:
    """IGM: how far one update from the guess is from the solution, on the average of the batch."""
    chain = Chain(block, w, told)
    chain.guess(0, chain.length, guess)
    updated = chain.update(0, chain.length)
    solution = block.ordered(u)[:, -chain.length :]
    return _norm((updated - solution).mean(dim=0), norm)


def _convergence(block: FlowBlock, u: Tensor, told: Told, norm: Norm) -> float:
    """CRM."""
    ordered = block.ordered(u)
    cache = block.open(told.condition, len(u), None)
    log_scale, _ = block.predict(block.inputs(ordered), cache)
    weight = block.project_out.weight.float()
    features = block.shape.features
    of_shift = _norm(weight[-features:], norm)
    if log_scale is None:
        return of_shift
    # The first token of a chain without a start token has scale 1.
    scale = F.pad(
        torch.exp(-log_scale), (0, 0, block.shape.tokens - block.shape.chain, 0), value=1.0
    )
    scaled = ordered * scale
    return _norm(scaled.mean(dim=0), norm) * _norm(weight[:features], norm) + of_shift


def _norm(matrix: Tensor, norm: Norm) -> float:
    if norm == "frobenius":
        return float(matrix.norm())
    return float(torch.linalg.matrix_norm(matrix, 2 if norm == "spectral" else 1))
