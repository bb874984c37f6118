"""Every method, under one contract."""

from typing import Any

from subbit.errors import RecipeError, nearest
from subbit.methods.base import LinearStats, Method, Options, Settings
from subbit.methods.pbs2p import PBS2P
from subbit.methods.pbs2p_plus import PBS2PPlus

__all__ = ["METHODS", "LinearStats", "Method", "Options", "Settings", "list_methods", "make_method"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (PBS2P, PBS2PPlus)}


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
