"""The studies: which cells make which table."""

from subbit.errors import RecipeError, nearest
from subbit.study.cells import Cell

__all__ = ["STUDIES", "cells_of"]

_SMALL = ["6-8", "5-8", "4-8"]

STUDIES: dict[str, tuple[str, list[Cell]]] = {
    "pbs2p": (
        "PBS2P at three N:M, and what each of its parts is worth (paper, Tables 1 and 4)",
        [
            Cell("original", None),
            *(Cell(f"pbs2p-{nm}", f"pbs2p-{nm}") for nm in _SMALL),
            Cell("6-8-no-spbo", "pbs2p-6-8", ["spbo=false"]),
            Cell("6-8-magnitude", "pbs2p-6-8", ["fine_metric=magnitude"]),
            Cell("6-8-random", "pbs2p-6-8", ["fine_metric=random"]),
            Cell("6-8-wanda", "pbs2p-6-8", ["fine_metric=wanda"]),
            Cell("6-8-si", "pbs2p-6-8", ["fine_metric=si"]),
            Cell("6-8-printed-mu", "pbs2p-6-8", ["mask_aware=false"]),
            Cell("6-8-full-target", "pbs2p-6-8", ["target=full"]),
            Cell("6-8-uniform", "pbs2p-6-8", ["coarse.allocation=uniform"]),
            Cell("6-8-exact-compensation", "pbs2p-6-8", ["compensation=exact"]),
        ],
    ),
}


def cells_of(study: str) -> list[Cell]:
    """The cells of a study.

    Raises:
        RecipeError: no such study.
    """
    if study not in STUDIES:
        raise RecipeError(f"unknown study '{study}'{nearest(study, STUDIES)}")
    return STUDIES[study][1]
