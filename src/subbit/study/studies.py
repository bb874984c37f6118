"""The studies: which cells make which table, and how they are measured."""

from dataclasses import dataclass, replace

from subbit.errors import RecipeError, nearest
from subbit.study.ablations import ABLATIONS
from subbit.study.cells import Cell, Protocol
from subbit.study.improvements import IMPROVEMENTS

__all__ = ["STUDIES", "Study", "study"]


@dataclass(frozen=True)
class Study:
    """One table.

    Attributes:
        title: what it shows.
        protocol: how every cell is calibrated and measured.
        cells: its rows.
        beside_published: whether the table shows what published code gave (`reference.yaml`).
        figure: whether perplexity is drawn against stored bits.
    """

    title: str
    protocol: Protocol
    cells: list[Cell]
    beside_published: bool = False
    figure: bool = False


_METHODS = (
    "rtn-3", "gptq-3", "rtn-2", "gptq-2", "awq-2",
    "magnitude-4-8", "wanda-4-8", "sparsegpt-4-8", "dsnot-wanda-4-8", "dsnot-sparsegpt-4-8",
    "alps-4-8",
    "xnor", "pb-llm", "billm", "billm-6-8", "billm-5-8", "billm-4-8",
    "arb", "arb-x", "arb-rc", "arb-rc-cgb",
    "stbllm-6-8", "stbllm-5-8", "stbllm-4-8",
    "pbs2p-6-8", "pbs2p-5-8", "pbs2p-4-8",
    "pbs2p-plus-6-8", "pbs2p-plus-5-8", "pbs2p-plus-4-8",
)  # fmt: skip

STUDIES: dict[str, Study] = {
    "pbs2p": Study(
        "PBS2P at three N:M (paper, Table 1), 32 x 2048 calibration tokens",
        Protocol(),
        [Cell("original", None), *(Cell(f"pbs2p-{n}-8", f"pbs2p-{n}-8") for n in (6, 5, 4))],
    ),
    "methods": Study(
        "Every method (papers' comparison), 32 x 2048 calibration tokens",
        Protocol(),
        [
            Cell("original", None),
            *(Cell(name, name) for name in _METHODS),
        ],
        beside_published=True,
    ),
    "pbs2p-parts": Study(
        "What each part of PBS2P is worth at 6:8 (paper, Table 4), 8 x 2048 calibration tokens",
        Protocol(nsamples=8, windows=10),
        [
            Cell("pbs2p", "pbs2p-6-8"),
            Cell("no-spbo", "pbs2p-6-8", ["spbo=false"]),
            Cell("metric-magnitude", "pbs2p-6-8", ["fine_metric=magnitude"]),
            Cell("metric-random", "pbs2p-6-8", ["fine_metric=random"]),
            Cell("metric-wanda", "pbs2p-6-8", ["fine_metric=wanda"]),
            Cell("metric-si", "pbs2p-6-8", ["fine_metric=si"]),
            Cell("coarse-uniform", "pbs2p-6-8", ["coarse.allocation=uniform"]),
            Cell("mu-as-printed", "pbs2p-6-8", ["mask_aware=false"]),
            Cell("exact-compensation", "pbs2p-6-8", ["compensation=exact"]),
        ],
    ),
}

STUDIES |= {name: Study(*parts) for name, parts in (ABLATIONS | IMPROVEMENTS).items()}
STUDIES["pareto"] = replace(STUDIES["pareto"], figure=True)


def study(name: str) -> Study:
    """A study by name.

    Raises:
        RecipeError: no such study.
    """
    if name not in STUDIES:
        raise RecipeError(f"unknown study '{name}'{nearest(name, STUDIES)}")
    return STUDIES[name]
