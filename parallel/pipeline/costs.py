"""What each link of a model costs: counted in operations, or measured on this device."""

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flows.models.chain import Chain, Link, Stream, Told


@torch.no_grad()
def operations(chain: Chain, inputs: Mapping[str, Tensor]) -> list[float]:
    """Of matrix products in each link's forward; the backward's are twice as many everywhere.

    inputs: of the model's forward, by name; on the meta device, as the model may be, nothing is computed
    """
    counts = []
    for link, stream, told in _walk(chain, inputs):
        with FlopCounterMode(display=False) as counter:
            link.run(stream, told)
        counts.append(float(counter.get_total_flops()))
    return counts


def seconds(chain: Chain, inputs: Mapping[str, Tensor], repeats: int) -> list[float]:
    """Forward and backward of each link by itself, the fastest of `repeats` after a first one."""
    best = [float("inf")] * len(chain.links)
    for repeat in range(repeats + 1):
        for index, (link, stream, told) in enumerate(_walk(chain, inputs)):
            spent = _timed(link, stream, told)
            if repeat:
                best[index] = min(best[index], spent)
    return best


def _walk(chain: Chain, inputs: Mapping[str, Tensor]) -> Iterator[tuple[Link, Stream, Told]]:
    """Each link with the stream that comes to it."""
    rest = {name: value for name, value in inputs.items() if name != "x"}
    stream: Stream = (inputs["x"],)
    with torch.no_grad():
        told = chain.tell(rest, len(inputs["x"]))
    for link in chain.links:
        yield link, stream, told
        with torch.no_grad():
            stream = link.run(stream, told)


def _timed(link: Link, stream: Stream, told: Told) -> float:
    leaves = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in stream)
    begin = _now(leaves[0].device)
    results = [result for result in link.run(leaves, told) if result.requires_grad]
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    return _now(leaves[0].device) - begin


def _now(device: torch.device) -> float:
    """On a CPU the time that this process has had, which what else runs there hardly changes."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
