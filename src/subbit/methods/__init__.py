"""Every method, under one contract."""

from typing import Any

from subbit.errors import RecipeError, nearest
from subbit.methods.alps import ALPS
from subbit.methods.arb import ARB
from subbit.methods.awq import AWQ
from subbit.methods.base import LinearStats, Method, Options, Settings
from subbit.methods.billm import BiLLM
from subbit.methods.dsnot import DSnoT
from subbit.methods.gptq import GPTQ
from subbit.methods.magnitude import Magnitude
from subbit.methods.pbllm import PBLLM
from subbit.methods.pbs2p import PBS2P
from subbit.methods.pbs2p_plus import PBS2PPlus
from subbit.methods.random_mask import RandomMask
from subbit.methods.rtn import RTN
from subbit.methods.sparsegpt import SparseGPT
from subbit.methods.stbllm import STBLLM
from subbit.methods.wanda import Wanda
from subbit.methods.xnor import XNOR

__all__ = ["METHODS", "LinearStats", "Method", "Options", "Settings", "list_methods", "make_method"]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(RTN, GPTQ, AWQ),
        *(RandomMask, Magnitude, Wanda, SparseGPT, DSnoT, ALPS),
        *(XNOR, PBLLM, BiLLM, ARB, STBLLM),
        *(PBS2P, PBS2PPlus),
    )
}


def make_method(
    name: str, options: dict[str, Any] | None = None, settings: Settings | None = None
) -> Method:
    """Build a method by name; unknown names and options are refused with the nearest known one."""
    if name not in METHODS:
        raise RecipeError(f"unknown method '{name}'{nearest(name, METHODS)}")
    return METHODS[name](options, settings)


def list_methods() -> list[dict[str, Any]]:
    """What `subbit methods` prints: name, paper, year, summary, options with defaults."""
    return [
        {
            "name": method.name,
            "paper": method.paper,
            "year": method.year,
            "summary": method.summary,
            "options": method.Opt().model_dump(mode="json"),
        }
        for method in METHODS.values()
    ]
