"""Load any Hugging Face causal LM, find its blocks and linears, run one block at a time.

No model family is named anywhere: blocks and linears are found, and what a block is called with
is recorded from the model's own forward pass.
"""

from subbit.model.backward import OutputGrams, TokenGradients, backward, look_at_gradients
from subbit.model.blocks import Blocks, find_blocks, find_linears, replace_module, weight_of
from subbit.model.calls import BlockCall
from subbit.model.capture import (
    block_similarities,
    capture_inputs,
    check_all_ran,
    in_float32,
    run_block,
)
from subbit.model.coverage import check_coverage, is_skipped
from subbit.model.end import ModelEnd, positions_at_once
from subbit.model.load import LoadedModel, load_model, take_model
from subbit.model.pairs import Look, Wiring, look_at_windows, wiring
from subbit.model.trace import first_inputs, record_calls
from subbit.model.weights import check_finite, fingerprint

__all__ = [
    "BlockCall",
    "Blocks",
    "LoadedModel",
    "Look",
    "ModelEnd",
    "OutputGrams",
    "TokenGradients",
    "Wiring",
    "backward",
    "block_similarities",
    "capture_inputs",
    "check_all_ran",
    "check_coverage",
    "check_finite",
    "find_blocks",
    "find_linears",
    "fingerprint",
    "first_inputs",
    "in_float32",
    "is_skipped",
    "load_model",
    "look_at_gradients",
    "look_at_windows",
    "positions_at_once",
    "record_calls",
    "replace_module",
    "run_block",
    "take_model",
    "weight_of",
    "wiring",
]
