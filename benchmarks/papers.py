"""What papers claim of objectives, couplings and paths, tried on the problem of `benchmarks/calibration.py`.

Each check trains what its paper proposes and holds it against the plain rectified flow, or against what
theory says exactly. A gate stands beside what was measured; it was set before the measurement, by the
paper's claim where it makes one in numbers.
"""

from collections.abc import Callable, Iterator

from benchmarks import papers_couplings, papers_paths
from benchmarks.calibration import Baseline, Row

Check = Callable[[Baseline], Iterator[Row]]

CHECKS: dict[str, Check] = {
    "rectified-flow": papers_couplings.rectified_flow,
    "flow-matching": papers_paths.flow_matching,
    "stochastic-interpolants": papers_paths.stochastic_interpolants,
    "ot-cfm": papers_couplings.optimal_transport,
    "multisample": papers_couplings.multisample,
    "sb-cfm": papers_couplings.schroedinger_bridge,
    "weighted-cfm": papers_couplings.weighted,
    "data-dependent": papers_couplings.data_dependent,
    "contrastive": papers_paths.contrastive,
    "improved-rectified-flow": papers_couplings.improved_rectified_flow,
    "boundary": papers_paths.boundary,
    "discrete": papers_paths.discrete,
}


def measure(names: list[str], seed: int, note: Callable[[str], None]) -> list[Row]:
    """The rows of the named checks; note: told of each row as it is found."""
    base, rows = Baseline(seed), []
    for name in names:
        for row in CHECKS[name](base):
            rows.append(row)
            note(f"{'met   ' if row.met else 'missed'} {row.paper}: {row.measured}")
    return rows
