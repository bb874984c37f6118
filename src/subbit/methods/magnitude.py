"""Magnitude pruning (Han et al., 2015)."""

from subbit.methods.pruned import ScorePruning

__all__ = ["Magnitude"]


class Magnitude(ScorePruning):
    """Keep the weights of the largest |w|, as they are; unstructured: of the whole linear."""

    name = "magnitude"
    paper = "Learning both Weights and Connections for Efficient Neural Networks"
    year = 2015
    summary = "keeps the largest weights; looks at no input"
    metric = "magnitude"
