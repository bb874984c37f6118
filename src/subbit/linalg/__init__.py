"""Second-order statistics of a linear's inputs and outputs, and the loops that use them."""

from subbit.linalg.blockloop import BlockView, compensate, run_blocks
from subbit.linalg.cholesky import Factor, factorize
from subbit.linalg.columns import sweep_columns
from subbit.linalg.gram import GramAccumulator, PairAccumulator, error_energy, relative_loss
from subbit.linalg.rowloop import run_rows
from subbit.linalg.target import shifted_target

__all__ = [
    "BlockView",
    "Factor",
    "GramAccumulator",
    "PairAccumulator",
    "compensate",
    "error_energy",
    "factorize",
    "relative_loss",
    "run_blocks",
    "run_rows",
    "shifted_target",
    "sweep_columns",
]
