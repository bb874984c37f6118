"""Wanda: pruning by weights and activations (Sun, Liu, Bair, Kolter, 2023)."""

from subbit.methods.pruned import ScorePruning

__all__ = ["Wanda"]


class Wanda(ScorePruning):
    """Keep the weights of the largest `|w_ij| ||x_j||_2`, as they are (equation 1).

    `||x_j||_2 = sqrt(H_jj)`. Weights are compared within a row, which the paper finds to matter;
    structured: columns by the sum of their scores.
    """

    name = "wanda"
    paper = "A Simple and Effective Pruning Approach for Large Language Models"
    year = 2023
    summary = "keeps the largest |weight| x input norm; weights unchanged"
    metric = "wanda"
