"""The ablations of the papers, one table for each choice, with a light protocol.

PBS2P, Table 4 and Table 3 of the earlier version; STBLLM, Tables 12, 14 and 15. The numbers there
are of LLaMA-7B; what can be checked on a small model is their order.
"""

from subbit.study.cells import Cell, Protocol

__all__ = ["ABLATIONS"]

_LIGHT = Protocol(nsamples=8, windows=10)
_WHOLE_ROW = 1 << 16  # a blocksize that is wider than any linear


def _cells(recipe: str, option: str, values: dict[str, object]) -> list[Cell]:
    """The recipe with one option changed; a value of None is the recipe as it is."""
    return [
        Cell(f"{recipe}-{name}", recipe, [] if value is None else [f"{option}={value}"])
        for name, value in values.items()
    ]


def _named(*values: str, default: str) -> dict[str, object]:
    return {value: None if value == default else value for value in values}


_METRICS = ("hessian", "wanda", "magnitude", "si", "random")
_PRUNING = ("unstructured", "semi-structured", "structured")
_SIZES = {str(size): None if size == 128 else size for size in (32, 64, 128, 256, 512, 1024)} | {
    "row": _WHOLE_ROW
}

ABLATIONS: dict[str, tuple[str, Protocol, list[Cell]]] = {
    "fine-metrics": (
        "What chooses the pruned weights, at 4:8 (PBS2P, Table 4b), 8 x 2048 calibration tokens",
        _LIGHT,
        [
            *_cells("pbs2p-4-8", "fine_metric", _named(*_METRICS, default="hessian")),
            *_cells("stbllm-4-8", "fine_metric", _named(*_METRICS, default="si")),
        ],
    ),
    "pruning-types": (
        "Single weights, N of every M, or whole columns, half of all weights (PBS2P, Table 4d), "
        "8 x 2048 calibration tokens",
        _LIGHT,
        [
            *_cells("pbs2p-4-8", "pruning", _named(*_PRUNING, default="semi-structured")),
            *_cells("stbllm-4-8", "pruning", _named(*_PRUNING, default="semi-structured")),
            *_cells("sparsegpt-4-8", "pruning", _named(*_PRUNING, default="semi-structured")),
        ],
    ),
    "coarse-rules": (
        "How the kept weights are shared among the blocks, at 4:8 (PBS2P, Table 4c), "
        "8 x 2048 calibration tokens",
        _LIGHT,
        _cells(
            "pbs2p-4-8",
            "coarse.allocation",
            _named(
                *("layer_importance", "uniform", "relative_importance", "sin"),
                default="layer_importance",
            ),
        ),
    ),
    "group-sizes": (
        "Columns that share their levels, at 4:8 (PBS2P, Table 4e; STBLLM, Table 12), "
        "8 x 2048 calibration tokens",
        _LIGHT,
        [
            *_cells("pbs2p-4-8", "blocksize", _SIZES),
            *_cells("stbllm-4-8", "blocksize", _SIZES),
        ],
    ),
    "calibration-sizes": (
        # 64 x 2048 tokens: more would reach the part of C4 that is held out
        "Windows of 2048 calibration tokens, at 4:8 (PBS2P, Table 4f)",
        _LIGHT,
        [
            Cell("original", None),
            *_cells("pbs2p-4-8", "calibration.nsamples", {"8": None, "16": 16, "32": 32, "64": 64}),
        ],
    ),
    "split-points": (
        "How many split points part the ordinary weights, and how they are searched (PBS2P's "
        "earlier version, Table 3f; STBLLM, Table 15), 8 x 2048 calibration tokens",
        _LIGHT,
        [
            *_cells("pbs2p-4-8", "split_points", {"1": 1, "2": None, "3": 3}),
            *_cells("stbllm-6-8", "split_points", {"1": 1, "2": None, "3": 3}),
            Cell("stbllm-6-8-naive", "stbllm-6-8", ["search=naive"]),
            Cell("stbllm-6-8-quantise-first", "stbllm-6-8", ["order=quantise-then-prune"]),
        ],
    ),
}
