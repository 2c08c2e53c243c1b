"""Two runs of a network of experts that part: whether rounding alone turned a choice.

Sums over ranks come out in another order in another layout, so that a token whose last chosen expert is
hardly above the next may go to either. From there on two runs are apart, and no layout is to blame: it is
said by name, with the token and the experts, and is neither averaged away nor taken for a wrong layout.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flows.models import choice, routers
from flows.models.choice import TIE
from parallel import processes
from tests.trainer import runs
from trainer.assembly import plan
from trainer.loop import one_step
from trainer.recipe import override_recipe
from trainer.reporting import Quiet
from trainer.run_folder import RunFolder, open_run
from trainer.running import assemble


class RoutingTie(AssertionError):
    """Two runs part where a token, or a place of an expert, hangs on less than rounding."""


@dataclass(frozen=True)
class Border:
    """Between what is chosen and what is not: the `chosen` largest values of each row, and the others.

    values: (batch, rows, candidates), -1 for what is no candidate
    """

    values: Tensor
    chosen: int

    def ties(self) -> Iterator[tuple[int, int, list[int], float]]:
        """(sample, row, candidates that may change sides, how far the border's two are apart)"""
        if self.chosen >= self.values.shape[-1]:
            return
        best = self.values.topk(self.chosen + 1, dim=-1).values
        last, following = best[..., -2], best[..., -1]
        for sample, row in ((last - following < TIE) & (following >= 0)).nonzero().tolist():
            middle = last[sample, row]
            near = ((self.values[sample, row] - middle).abs() < TIE).nonzero().flatten().tolist()
            yield sample, row, near, float(middle - following[sample, row])


@dataclass
class Choices:
    """What routers decided in one step, by call: experts for a token, tokens for an expert's places."""

    experts: list[Border] = field(default_factory=list)
    places: list[Border] = field(default_factory=list)


def parting(ours: Path, theirs: Path, exact: float) -> int | None:
    """The first step, from 0, in which choices or losses are not the same; None if all are."""
    apart = (runs.series(ours, "loss") - runs.series(theirs, "loss")).abs()
    far = (apart > exact * runs.series(theirs, "loss").abs()).tolist()
    told = [[line["experts"] for line in runs.lines(folder)] for folder in (ours, theirs)]
    for step, (one, other) in enumerate(zip(*told, strict=True)):
        if far[step] or one["load"] != other["load"] or one["dropped"] != other["dropped"]:
            return step
    return None


def check(ours: Path, theirs: Path, exact: float) -> None:
    """Raise RoutingTie if two runs part, and rounding could have turned the first choice that differs.

    theirs: of one rank; it is trained once more, up to where the runs part
    exact: as far as losses may be apart
    """
    step = parting(ours, theirs, exact)
    if step is None:
        return
    mine, its = (runs.lines(folder)[step]["experts"]["load"] for folder in (ours, theirs))
    depth = len(its)
    choices = decisions(theirs, step)
    where = f"the runs part in step {step + 1}, where"
    for layer in range(depth):
        moved = torch.tensor(mine[f"layer_{layer}"]) - torch.tensor(its[f"layer_{layer}"])
        if moved.any():
            for sample, token, near, gap in _of_layer(choices.experts, layer, depth):
                if (moved[near] > 0).any() and (moved[near] < 0).any():
                    raise RoutingTie(
                        f"{where} in layer {layer} token {token} of sample {sample} goes to one or another "
                        f"of experts {near} by {gap:.1e} of a score, which rounding turns"
                    )
            return
    for layer in range(depth):
        for sample, expert, near, gap in _of_layer(choices.places, layer, depth):
            raise RoutingTie(
                f"{where} in layer {layer} one or another of tokens {near} of sample {sample} finds a place "
                f"at expert {expert} by {gap:.1e} of a score, which rounding turns"
            )


def _of_layer(
    calls: list[Border], layer: int, depth: int
) -> Iterator[tuple[int, int, list[int], float]]:
    """Ties of a layer, by the samples of the whole batch: layers are called in turn by each microbatch."""
    before = 0
    for border in calls[layer::depth]:
        for sample, row, near, gap in border.ties():
            yield before + sample, row, near, gap
        before += len(border.values)


def decisions(reference: Path, step: int) -> Choices:
    """What routers decided in a step, from 0, of a run of one rank, which is trained anew up to there."""
    _, recipe = open_run(str(reference))
    with (
        tempfile.TemporaryDirectory(prefix="ties-") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        changes = [f"run.dir={folder}", "train.checkpoint_activations=0"]
        made = plan(override_recipe(recipe, changes), 1)
        patch.setattr(processes, "choose_device", lambda *_: torch.device("cpu"))
        ranks = processes.start("cpu", 60)
        try:
            parts = assemble(made, RunFolder(Path(folder)), ranks, Quiet())
            for number in range(step):
                one_step(parts, number, False)
            with recorded() as choices:
                one_step(parts, step, False)
            parts.loader.close()
        finally:
            processes.stop()
    return choices


@contextmanager
def recorded() -> Iterator[Choices]:
    """All that routers decide meanwhile."""
    choices = Choices()
    by_tokens, of_places = choice.tokens_choose, choice._strongest

    def tokens_choose(
        scores: Tensor, bias: Tensor | None, routing: choice.Routing, mask: Tensor | None
    ) -> Any:
        ranked = scores.detach() if bias is None else scores.detach() + bias
        choices.experts.append(Border(ranked - ranked.amin(), routing.chosen))
        return by_tokens(scores, bias, routing, mask)

    def strongest(score: Tensor, expert: Tensor, experts: int, places: int) -> Any:
        claims = score.new_full((*score.shape[:2], experts), -1.0).scatter(-1, expert, score)
        choices.places.append(Border(claims.transpose(1, 2), places))
        return of_places(score, expert, experts, places)

    with pytest.MonkeyPatch.context() as patch:
        # Routers know it by a name of their own.
        patch.setattr(routers, "tokens_choose", tokens_choose)
        patch.setattr(choice, "tokens_choose", tokens_choose)
        patch.setattr(choice, "_strongest", strongest)
        yield choices
