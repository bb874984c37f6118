"""Tune what is not a code by gradients, opt-in: levels, norms and biases.

`refit_block` reconstructs one block after the other while the model is compressed, `refit_model`
then all blocks together. Codes and masks stay what they are, and so do the bits.
"""

from subbit.refit.block import refit_block
from subbit.refit.model import STEP, refit_model
from subbit.refit.tuned import JUDGED, Refit, loose_tensors

__all__ = ["JUDGED", "STEP", "Refit", "loose_tensors", "refit_block", "refit_model"]
