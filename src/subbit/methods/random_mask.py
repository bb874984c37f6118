"""Random pruning, the floor of every comparison."""

from subbit.methods.pruned import ScorePruning

__all__ = ["RandomMask"]


class RandomMask(ScorePruning):
    """Keep weights at random, as they are; the draw depends on the seed and the linear's name."""

    name = "random"
    paper = "Random pruning, as the baseline of PBS2P (Table 4b)"
    year = 2025
    summary = "keeps weights at random"
    metric = "random"
