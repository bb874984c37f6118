"""The model card: what the folder is, how it was made, what its sizes mean, how to load it."""

import re
from typing import Any

__all__ = ["model_card"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_LOAD = """\
## How to load it

`pip install subbit`, then either of

```python
import subbit
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")  # works after `import subbit`
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

```python
import subbit

model = subbit.load("this folder")  # checks the checksum of every file first
```
"""

_REMOTE = """
Without `import subbit` in your own code, `AutoModelForCausalLM.from_pretrained("this folder",
trust_remote_code=True)` does the same import; subbit must be installed all the same.
"""

_LIMITS = """
## Limits

- This model is worse than its base model; how much depends on the model and the text. Measure it on
  your own with `subbit eval`.
- Paper bits count the signs of the kept weights as published papers do. Stored bits count all that
  the packed linears need to be read back: masks, group labels and scales too. Only the second tells
  the size of a file.
- It was not evaluated for safety. The licence, the intended uses and the biases of the base model
  apply.
- A damaged or edited file of the model is refused by `subbit.load`. This page and the log of the
  compression may be edited.
"""


_RESULT = {
    False: "It was calibrated, not trained: embeddings, norms and the output head are as they "
    "were.",
    True: "Its levels, norms and biases inside the blocks were tuned by gradients on calibration "
    "text; embeddings, the last norm and the output head are as they were.",
}


def _is_tuned(recipe: dict[str, Any]) -> bool:
    """Whether gradients changed more than codes and levels of linears."""
    refit = recipe.get("refit") or {}
    return bool(refit.get("steps") or refit.get("model_steps"))


def _number(value: float | None, digits: int = 3) -> str:
    return "not recorded" if value is None else f"{value:.{digits}f}"


def _table(rows: list[tuple[str, str]], head: tuple[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows]) + "\n"


def _flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as table rows, keys dotted."""
    rows = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value).replace("|", "\\|").replace("\n", " ")))
    return rows


def _front_matter(base_model: str | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if base_model and _HUB_ID.fullmatch(base_model):
        lines += [f"base_model: {base_model}", "base_model_relation: quantized"]
    return "\n".join([*lines, "tags:", "- subbit", "- quantized", "- 1-bit", "---", ""])


def model_card(facts: dict[str, Any], *, remote_code: bool) -> str:
    """Write the model card.

    Args:
        facts: what `inspect_folder` returns for the folder.
        remote_code: whether the folder also opens through `trust_remote_code=True`.

    Returns:
        Markdown with the metadata block that model hubs read.
    """
    total, recipe = facts["total"], dict(facts["recipe"])
    base = facts["base_model"] or "a causal language model"
    name = recipe.get("name", "unnamed recipe")
    sizes = [
        ("packed linears", str(len(facts["linears"]))),
        ("weights in them", f"{total['weights']:,}"),
        ("**paper bits** per weight", _number(total["paper_bits"])),
        ("**stored bits** per weight", _number(total["stored_bits"])),
        ("size of the weight files", f"{total['file_bytes'] / 1e6:,.2f} MB"),
        ("file bits per parameter", _number(total["file_bits_per_parameter"])),
        ("the same without embeddings", _number(total["file_bits_without_embeddings"])),
    ]
    return "\n".join(
        [
            _front_matter(facts["base_model"]),
            f"# {base}, compressed with {name}\n",
            f"This is {base} with the linear layers of its decoder blocks in few bits, packed by "
            f"subbit {facts['subbit_version']} (format version {facts['format_version']}). "
            f"{_RESULT[_is_tuned(recipe)]}\n",
            "## Size\n",
            _table(sizes, ("quantity", "value")),
            _LOAD + (_REMOTE if remote_code else ""),
            "## Recipe\n",
            _table(_flat(recipe), ("key", "value")),
            "## Calibration\n",
            _table(_flat(facts["calibration"]), ("key", "value")),
            _LIMITS.lstrip("\n"),
        ]
    )
