"""What the authors' published code gave, to stand beside our figures."""

from functools import cache
from importlib import resources

import yaml

__all__ = ["published_figures"]


@cache
def published_figures() -> dict[str, dict[str, float]]:
    """By cell name of the study `methods`: `wikitext2`, `c4`, `paper_bits`, and `loss` or not.

    `reference.yaml` says on which model and how they were measured.
    """
    text = resources.files("subbit.study").joinpath("reference.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
