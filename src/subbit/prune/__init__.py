"""What to prune: scores, N:M masks and sub-masks, and how many weights each block keeps."""

from subbit.prune.allocate import allocate
from subbit.prune.masks import keep_mask, ranks_in_groups
from subbit.prune.patterns import PRUNING, kept_count, pruning_ranks, select, structure
from subbit.prune.scores import BY_ROW, METRICS, Scorer

__all__ = [
    "BY_ROW",
    "METRICS",
    "PRUNING",
    "Scorer",
    "allocate",
    "keep_mask",
    "kept_count",
    "pruning_ranks",
    "ranks_in_groups",
    "select",
    "structure",
]
