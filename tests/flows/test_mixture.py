"""Mixtures of experts against a loop over tokens and a loop over experts, written from the papers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from flows.models.choice import Routing, experts_choose, tokens_choose
from flows.models.mixture import Experts, Mixture
from flows.models.routers import RouterCell, rebalance, softmax
from parallel.memory import LiveBytes

BATCH, TOKENS, WIDTH, HIDDEN, SHARED = 3, 6, 8, 16, 8
EXPERTS, CHOSEN, RECURRENT = 5, 2, 8
EXACT = 1e-6

PLAIN = Routing(EXPERTS, CHOSEN)
OPTIONS = {
    "softmax": PLAIN,
    "renormalised": replace(PLAIN, renormalise=True),
    "sigmoid": replace(PLAIN, gate="sigmoid"),
    "sigmoid scaled": replace(PLAIN, gate="sigmoid", renormalise=True, scale=2.5),
    "one expert": replace(PLAIN, chosen=1),
    "all experts": replace(PLAIN, chosen=EXPERTS),
    "capacity": replace(PLAIN, capacity=0.7),
    "capacity renormalised": replace(PLAIN, capacity=0.4, renormalise=True),
    "capacity of one expert": replace(PLAIN, chosen=1, capacity=0.7, renormalise=True, z_weight=0.1),
    "experts choose": replace(PLAIN, chooser="experts"),
    "experts choose more": replace(PLAIN, chooser="experts", capacity=1.5, renormalise=True),
    "experts choose by sigmoid": replace(PLAIN, chooser="experts", gate="sigmoid", z_weight=0.1),
    "balance of samples": replace(PLAIN, balance="sequence", balance_weight=0.3),
    "balance of the last step": replace(PLAIN, balance="previous", balance_weight=0.3),
    "sigmoid balance": replace(PLAIN, gate="sigmoid", balance="sequence", balance_weight=0.3),
    "z": replace(PLAIN, z_weight=0.1),
    "bias": replace(PLAIN, bias_rate=0.001),
    "bias sigmoid": replace(PLAIN, gate="sigmoid", renormalise=True, bias_rate=0.001),
    "recurrent": replace(PLAIN, recurrent=RECURRENT, renormalise=True),
    "recurrent first": replace(PLAIN, recurrent=RECURRENT, balance="sequence", balance_weight=0.2),
}  # fmt: skip


def made(routing: Routing, shared: int = SHARED) -> tuple[Mixture, RouterCell | None]:
    """Random weights, and router buffers as some step may have left them."""
    generator = torch.Generator().manual_seed(1)
    mixture = Mixture(WIDTH, HIDDEN, shared, routing)
    cell = RouterCell(routing.recurrent) if routing.recurrent else None
    for module in filter(None, (mixture, cell)):
        for weight in module.parameters():
            nn.init.normal_(weight, 0.0, 0.4, generator=generator)
    if mixture.router.share is not None:
        mixture.router.share.copy_(torch.rand(EXPERTS, generator=generator).softmax(-1))
    if mixture.router.bias is not None:
        mixture.router.bias.copy_(torch.rand(EXPERTS, generator=generator) * 0.3)
    return mixture, cell


def inputs(routing: Routing, *, later: bool = False, masked: bool = False) -> dict[str, Tensor]:
    """Inputs of a layer; `later`: one that is handed a state."""
    generator = torch.Generator().manual_seed(2)
    given = {"x": torch.randn(BATCH, TOKENS, WIDTH, generator=generator)}
    if later:
        given["state"] = torch.randn(BATCH, TOKENS, RECURRENT, generator=generator)
    if masked:
        slots = routing.chosen if routing.chooser == "tokens" else EXPERTS
        kept = torch.rand(BATCH, TOKENS, slots, generator=generator) > 0.3
        given["mask"] = kept / 0.7
    return given


def reference(
    mixture: Mixture, cell: RouterCell | None, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, penalty and state, one token and one expert at a time, in float64."""
    routing, router = mixture.router.routing, mixture.router
    weights = dict(mixture.named_parameters())
    x, state, mask = given["x"], given.get("state"), given.get("mask")
    ys, penalties, states = [], [], []
    for sample in range(BATCH):
        rows, logits, carried = [], [], []
        for token in range(TOKENS):
            h = x[sample, token]
            if routing.recurrent:
                before = torch.zeros(RECURRENT).double() if state is None else state[sample, token]
                h = unit(weights["router.inward.weight"] @ h, before, cell)
                carried.append(h)
            logits.append(weights["router.gate.weight"] @ h)
            rows.append(x[sample, token])
        scores = [own.softmax(0) if routing.gate == "softmax" else own.sigmoid() for own in logits]
        gates, asked = chosen_by(routing, router.bias, scores)
        y = []
        for token in range(TOKENS):
            total = torch.zeros(WIDTH).double()
            for slot, (expert, weight) in enumerate(gates[token]):
                if weight is None:
                    continue
                if mask is not None:
                    place = slot if routing.chooser == "tokens" else expert
                    weight = weight * mask[sample, token, place]
                up, down = weights["experts.up"][expert], weights["experts.down"][expert]
                total = total + weight * gated(up, down, rows[token])
            if mixture.shared is not None:
                up, down = weights["shared.up.weight"], weights["shared.down.weight"]
                total = total + gated(up, down, rows[token])
            y.append(total)
        ys.append(torch.stack(y))
        penalties.append(penalty_of(routing, router.share, scores, logits, asked))
        states.append(torch.stack(carried) if carried else None)
    handed = torch.stack(states) if routing.recurrent else state
    return torch.stack(ys), torch.stack(penalties), handed


def gated(up: Tensor, down: Tensor, h: Tensor) -> Tensor:
    gate, value = (up @ h).chunk(2)
    return down @ (gate * torch.sigmoid(gate) * value)


def unit(x: Tensor, state: Tensor, cell: RouterCell) -> Tensor:
    """Torch's own cell with the mapped weights."""
    gru = nn.GRUCell(RECURRENT, RECURRENT).double()
    mapped = dict(
        zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), cell.parameters(), strict=True)
    )
    return torch.func.functional_call(gru, mapped, (x[None], state[None]))[0]


def chosen_by(routing: Routing, bias: Tensor | None, scores: list[Tensor]):
    """Of each token [(expert, weight or None where it is dropped)], and how often experts were asked."""
    if routing.chooser == "experts":
        gates = [[] for _ in scores]
        capacity = routing.capacity or 1.0
        places = min(TOKENS, math.ceil(capacity * routing.chosen * TOKENS / EXPERTS))
        for expert in range(EXPERTS):
            order = sorted(range(TOKENS), key=lambda token: -float(scores[token][expert].detach()))
            for token in order[:places]:
                gates[token].append((expert, scores[token][expert]))
        asked = [places] * EXPERTS
    else:
        gates, asked = [], [0] * EXPERTS
        for s in scores:
            ranked = s if bias is None else s + bias
            best = sorted(range(EXPERTS), key=lambda e: -float(ranked[e].detach()))[
                : routing.chosen
            ]
            gates.append([(e, s[e]) for e in best])
            for e in best:
                asked[e] += 1
    if routing.renormalise:
        gates = [[(e, w / sum(v for _, v in slots)) for e, w in slots] for slots in gates]
    gates = [[(e, w * routing.scale) for e, w in slots] for slots in gates]
    if routing.chooser == "tokens" and routing.capacity:
        places = math.ceil(routing.capacity * routing.chosen * TOKENS / EXPERTS)
        for expert in range(EXPERTS):
            claims = [
                (float(scores[t][e].detach()), t)
                for t, slots in enumerate(gates)
                for e, _ in slots
                if e == expert
            ]
            lost = {t for _, t in sorted(claims, reverse=True)[places:]}
            gates = [
                [(e, None if e == expert and t in lost else w) for e, w in slots]
                for t, slots in enumerate(gates)
            ]  # fmt: skip
    return gates, asked


def penalty_of(routing: Routing, share: Tensor | None, scores, logits, asked) -> Tensor:
    total = torch.zeros(()).double()
    for expert in range(EXPERTS):
        mean = sum(s[expert] / s.sum() for s in scores) / TOKENS
        if routing.balance == "sequence":
            part = asked[expert] / sum(asked)
            total = total + routing.balance_weight * EXPERTS * part * mean
        if routing.balance == "previous":
            total = total + routing.balance_weight * EXPERTS * share[expert] * mean
    return total + routing.z_weight * sum(torch.logsumexp(own, 0) ** 2 for own in logits) / TOKENS


def gradients(mixture, cell, given, function) -> dict[str, Tensor]:
    """Outputs and gradients of a loss that all outputs are in."""
    y, penalty, state = function(mixture, cell, given)
    generator = torch.Generator().manual_seed(3)
    probe = torch.randn(y.shape, generator=generator).to(y.dtype)
    loss = (y * probe).sum() + (penalty * probe[:, 0, 0]).sum()
    if mixture.router.routing.recurrent:
        loss = loss + (state * probe[..., :1]).sum()
    loss.backward()
    found = {"y": y.detach(), "penalty": penalty.detach()}
    for module in filter(None, (mixture, cell)):
        found |= {name: weight.grad for name, weight in module.named_parameters()}
    return found | {f"input {name}": value.grad for name, value in given.items()}


def ours(mixture: Mixture, cell: RouterCell | None, given: dict[str, Tensor]):
    weights = cell.weights() if cell is not None else None
    y, decision = mixture(given["x"], given.get("state"), weights, given.get("mask"))
    return y, decision.penalty, decision.state


def doubled(module):
    return None if module is None else module.double()


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_router_equals_a_double_loop(name: str, masked: bool) -> None:
    routing = OPTIONS[name]
    later = routing.recurrent > 0 and "first" not in name
    found = []
    for wide in (False, True):
        mixture, cell = made(routing)
        given = inputs(routing, later=later, masked=masked)
        if wide:
            mixture, cell = doubled(mixture), doubled(cell)
        given = {
            n: (v.double() if wide else v).requires_grad_(n != "mask") for n, v in given.items()
        }
        found.append(gradients(mixture, cell, given, reference if wide else ours))
    single, double = found
    assert single.keys() == double.keys()
    for key, expected in double.items():
        if expected is None:
            assert single[key] is None, key
            continue
        scale = float(expected.abs().max()) or 1.0
        assert float((single[key] - expected).abs().max()) <= EXACT * max(scale, 1.0), key
    assert float(double["router.gate.weight"].abs().max()) > 1e-3


def test_statistics_count_what_was_asked_and_what_was_dropped() -> None:
    mixture, _ = made(replace(PLAIN, capacity=0.5))
    x = inputs(PLAIN)["x"]
    slots, _, routed, *_ = mixture.router(x)
    assert torch.equal(routed.load.sum(-1), torch.full((BATCH,), float(TOKENS * CHOSEN)))
    places = math.ceil(0.5 * CHOSEN * TOKENS / EXPERTS)
    assert torch.equal(routed.dropped, (routed.load - places).clamp_min(0).sum(-1))
    assert (
        len(slots.token)
        == BATCH * TOKENS * CHOSEN - int(routed.dropped.sum())
        == int(slots.counts.sum())
    )
    assert (routed.entropy > 0).all()
    assert (routed.entropy < math.log(EXPERTS)).all()
    assert torch.equal(routed.ties, torch.zeros(BATCH))
    alike, _ = made(PLAIN)
    nn.init.zeros_(alike.router.gate.weight)
    _, _, routed, *_ = alike.router(x)
    assert torch.equal(routed.ties, torch.full((BATCH,), float(TOKENS)))
    assert torch.allclose(routed.entropy, torch.full((BATCH,), math.log(EXPERTS)))


def test_claims_that_hang_on_rounding_are_ties() -> None:
    """Two tokens want the one place of an expert: with one score, and, in another sample, with two."""
    close = [[0.6, 0.1, 0.3], [0.6 + 1e-7, 0.3, 0.1], [0.1, 0.7, 0.2]]
    far = [[0.3, 0.1, 0.2], [0.6, 0.3, 0.1], [0.1, 0.7, 0.2]]
    for renormalise in (False, True):
        routing = Routing(3, 1, capacity=1.0, renormalise=renormalise)
        slots, routed, _ = tokens_choose(torch.tensor([close, far]), None, routing, None)
        assert routed.dropped.tolist() == [1.0, 1.0]
        assert routed.ties.tolist() == [1.0, 0.0]
        assert slots.token.tolist() == [1, 4, 2, 5]


def test_memory_of_choices_grows_with_tokens_alone() -> None:
    """By experts: four times as many tokens, four times as much."""
    peaks = []
    for tokens in (256, 1024):
        scores = torch.rand(1, tokens, 4, generator=torch.Generator().manual_seed(6))
        with LiveBytes() as live:
            experts_choose(scores, replace(PLAIN, experts=4, chooser="experts"), None)
        peaks.append(live.peak)
    assert peaks[1] < 5 * peaks[0]


def test_where_experts_choose_all_have_as_much_and_tokens_may_be_left_out() -> None:
    mixture, _ = made(replace(PLAIN, chooser="experts", chosen=1))
    slots, _, routed, *_ = mixture.router(inputs(PLAIN)["x"])
    assert len(set(slots.counts.tolist())) == 1
    reached = torch.zeros(BATCH * TOKENS, dtype=torch.bool)
    reached[slots.token] = True
    assert torch.equal(routed.dropped, (~reached).view(BATCH, TOKENS).sum(1).float())
    assert routed.dropped.sum() > 0


@pytest.mark.parametrize("balance", ["previous", "sequence"])
def test_a_balanced_router_costs_its_weight(balance: str) -> None:
    mixture, _ = made(replace(PLAIN, balance=balance, balance_weight=0.01))
    mixture.router.reset_buffers()
    nn.init.zeros_(mixture.router.gate.weight)
    _, penalty, *_ = mixture.router(inputs(PLAIN)["x"])
    assert torch.allclose(penalty, torch.full((BATCH,), 0.01))


@pytest.mark.parametrize("name", ["softmax", "renormalised", "sigmoid", "one expert"])
def test_permuted_experts_compute_the_same_bits(name: str) -> None:
    mixture, _ = made(OPTIONS[name])
    x = inputs(PLAIN)["x"]
    before = mixture(x)[0]
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in (mixture.router.gate.weight, mixture.experts.up, mixture.experts.down):
            weight.copy_(weight[order].clone())
    assert torch.equal(mixture(x)[0], before)


def test_the_softmax_is_the_usual_one_in_any_order_of_experts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4096, 64, generator=generator)
    order = torch.randperm(64, generator=generator)
    assert torch.equal(softmax(logits)[:, order], softmax(logits[:, order]))
    assert torch.allclose(softmax(logits), logits.double().softmax(-1).float(), rtol=1e-5, atol=0)


def test_a_traced_router_counts_pairs_of_experts() -> None:
    mixture, _ = made(PLAIN)
    mixture.router.traced = True
    x = inputs(PLAIN)["x"]
    first = mixture.router(x)
    assert not first.routed.flow.any()
    second = mixture.router(2 - x, before=first.asked)
    expected = torch.zeros(BATCH, EXPERTS, EXPERTS)
    for sample in range(BATCH):
        for one, other in zip(first.asked[sample], second.asked[sample], strict=True):
            assert int(one.sum()) == int(other.sum()) == CHOSEN
            for i in one.nonzero().flatten():
                for j in other.nonzero().flatten():
                    expected[sample, i, j] += 1
    assert torch.equal(second.routed.flow, expected)
    assert torch.equal(second.routed.flow.sum(1), CHOSEN * second.routed.load)


def test_a_bias_changes_the_choice_and_not_the_weights() -> None:
    mixture, _ = made(replace(PLAIN, bias_rate=0.001))
    x = inputs(PLAIN)["x"]
    mixture.router.bias.zero_()
    mixture.router.bias[3] = 100.0
    slots, _, routed, *_ = mixture.router(x)
    assert torch.equal(routed.load[:, 3], torch.full((BATCH,), float(TOKENS)))
    scores = (x @ mixture.router.gate.weight.T).softmax(-1)[..., 3].flatten()
    begin = int(slots.counts[:3].sum())
    rows = slice(begin, begin + BATCH * TOKENS)
    assert torch.allclose(slots.weight[rows], scores[slots.token[rows]], atol=1e-6)


def test_a_sample_is_routed_alike_in_any_batch() -> None:
    """Bit by bit but for the sums of its own rows; so no split of a batch changes a choice."""
    for routing in OPTIONS.values():
        if routing.recurrent:
            continue
        mixture, _ = made(routing)
        x = inputs(routing)["x"]
        whole = mixture(x)
        parts = [mixture(one[None]) for one in x]
        assert torch.allclose(torch.cat([part[0] for part in parts]), whole[0], atol=1e-6)
        said, of_whole = [part[1] for part in parts], whole[1]
        assert torch.equal(torch.cat([one.routed.load for one in said]), of_whole.routed.load)
        penalties = torch.cat([one.penalty for one in said])
        assert torch.allclose(penalties, of_whole.penalty, atol=1e-6)


def test_rebalancing_moves_biases_and_remembers_shares() -> None:
    routing = replace(PLAIN, balance="previous", balance_weight=0.1, bias_rate=0.001)
    routers = [made(routing)[0].router for _ in range(2)]
    before = [(r.bias.clone(), r.share.clone()) for r in routers]
    load = torch.tensor([[9.0, 1, 1, 1, 1], [2.0, 2, 2, 2, 5]])
    rebalance(routers, load, torch.ones(()))
    for router, (bias, share) in zip(routers, before, strict=True):
        assert torch.equal(router.bias, bias)
        assert torch.equal(router.share, share)
    rebalance(routers, load, torch.zeros(()))
    for router, (bias, _), slots in zip(routers, before, load, strict=True):
        assert torch.allclose(router.share, slots / slots.sum())
        moved = router.bias - bias
        assert float(moved.sum()) == pytest.approx(0.0, abs=1e-7)
        assert moved[slots == slots.max()].item() < 0 < moved[slots == slots.min()].min().item()


def test_biases_balance_a_router_that_prefers_an_expert() -> None:
    routing = replace(PLAIN, gate="sigmoid", bias_rate=0.01)
    mixture, _ = made(routing)
    mixture.router.reset_buffers()
    with torch.no_grad():
        mixture.router.gate.weight[0] += 1.0
    x = torch.randn(16, 32, WIDTH, generator=torch.Generator().manual_seed(4)) + 0.5
    loads = []
    for _ in range(200):
        _, _, routed, *_ = mixture.router(x)
        load = routed.load.sum(0)
        rebalance([mixture.router], load[None], torch.zeros(()))
        loads.append(float(load.max() / load.mean()))
    assert loads[0] > 1.5
    assert loads[-1] < 1.15


def test_experts_with_biases_equal_a_loop_over_them() -> None:
    """Forward and gradients, with an expert that nobody chose."""
    generator = torch.Generator().manual_seed(5)
    experts = Experts(EXPERTS, WIDTH, HIDDEN, "gelu")
    for weight in experts.parameters():
        nn.init.normal_(weight, 0.0, 0.4, generator=generator)
    counts = torch.tensor([3, 0, 5, 1, 2])
    rows = torch.randn(11, WIDTH, generator=generator, requires_grad=True)
    probe = torch.randn(11, WIDTH, generator=generator)
    (experts(rows, counts, lambda: None)[0] * probe).sum().backward()
    found = {name: weight.grad for name, weight in experts.named_parameters()} | {"rows": rows.grad}
    wide = {n: p.detach().double().requires_grad_() for n, p in experts.named_parameters()}
    x = rows.detach().double().requires_grad_()
    outputs = []
    for expert, own in enumerate(x.split(counts.tolist())):
        hidden = own @ wide["up"][expert].T + wide["up_bias"][expert]
        hidden = nn.functional.gelu(hidden, approximate="tanh")
        outputs.append(hidden @ wide["down"][expert].T + wide["down_bias"][expert])
    (torch.cat(outputs) * probe).sum().backward()
    for name, expected in (wide | {"rows": x}).items():
        scale = max(1.0, float(expected.grad.abs().max()))
        assert float((found[name] - expected.grad).abs().max()) <= EXACT * scale, name
    assert not found["up"][1].any()
