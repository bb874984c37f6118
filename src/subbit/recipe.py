"""Recipes: what to do to a model, from YAML, the command line and Python alike.

A recipe is plain data. It is checked where it is read: an unknown key names the nearest known one,
and a recipe that contradicts itself is refused in one sentence. The `options` belong to the method
and are checked by the method's own model.
"""

import difflib
import json
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from subbit.errors import RecipeError, nearest

__all__ = [
    "CalibrationSpec",
    "CoarseSpec",
    "Recipe",
    "list_recipes",
    "load_recipe",
    "recipe_yaml",
]

MAX_M = 16


# YAML as people expect it: `6:8` is text (YAML 1.1 makes it 368, base 60), `1e-3` is a number.
_NUMBERS = {
    "int": r"^[-+]?(0|[1-9][0-9]*)$",
    "float": r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"
    r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$",
}


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML takes for a number: `6:8` is one in 1.1."""


_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if not rule[0].endswith((":int", ":float"))]
    for first, rules in _Loader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    for _tag, _pattern in _NUMBERS.items():
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list("-+.0123456789")
        )


def _parse_nm(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = f"{value[0]}:{value[1]}"
    match = re.fullmatch(r"(\d+):(\d+)", value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f"nm is {value!r} but must be 'N:M' with N kept of M, such as '6:8', or null"
        )
    n, m = int(match[1]), int(match[2])
    if not 1 <= n <= m <= MAX_M:
        raise ValueError(
            f"nm is '{n}:{m}' but needs 1 <= N <= M <= {MAX_M} (N kept of every M weights)"
        )
    return n, m


NM = Annotated[
    tuple[int, int] | None,
    BeforeValidator(_parse_nm),
    PlainSerializer(lambda nm: nm and f"{nm[0]}:{nm[1]}", return_type=str | None),
]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class CalibrationSpec(_Spec):
    """Which text the method sees.

    Attributes:
        source: a known corpus name, a `.txt` or `.jsonl` file, `stdlib` or `self`.
        nsamples: number of windows.
        seqlen: tokens of one window.
        bos: where the BOS token goes: nowhere, before every document, before every window.
        sample: the first windows of the text, or windows at random places drawn with `seed`.
        seed: seed of that draw (and of the text that `self` samples).
        sequential: let every linear see what the already compressed linears before it in its block
            give, at the price of one more run of the block for each distinct input; otherwise a
            block's linears all see the block as it was.
        tokens: "equal": every token counts the same, as in all papers; "relative": for a linear
            whose output is added to the hidden states, a token counts by 1 / their mean square,
            since the normalisation that follows divides by it; "gradient": for each input, by the
            squared gradient of the text's log-likelihood in what the linears put out, in the
            original model, at the price of a run there and back.
        outputs: "equal": a linear's outputs count alike and by themselves, as in all papers;
            "gradient": by the gradients of the text's log-likelihood in them, in the original
            model, so that rows make up for each other's errors; at the price of a run there and
            back, and of a `(rows, rows)` matrix in memory for each linear.
        first_token: what the first token of every window counts, in tokens. Attention of most
            models rests on it, so an error in its keys and values reaches all others.
    """

    source: str = "c4"
    nsamples: int = Field(128, ge=1)
    seqlen: int = Field(2048, ge=2)
    bos: Literal["none", "document", "window"] = "none"
    sample: Literal["first", "random"] = "first"
    seed: int = Field(0, ge=0)
    sequential: bool = False
    tokens: Literal["equal", "relative", "gradient"] = "equal"
    outputs: Literal["equal", "gradient"] = "equal"
    first_token: float = Field(1.0, ge=0)


class AsymmetrySpec(_Spec):
    """Asymmetric calibration: compress towards the original model's outputs.

    Attributes:
        strength: how far a linear's target moves from its own weight (0, off) to the least-squares
            solution for the original model's outputs on the compressed model's inputs (1).
        linears: for all linears, or for the "writers" alone, whose outputs are added to the hidden
            states.
        residual: let a writer also make up for what the hidden states it adds to have lost; with
            "relative" by their size: from a token whose hidden states are larger than the median
            token's so much less is asked, by the square, since later layers normalise them.
        percdamp: share of mean(diag H) that damps the shift.
    """

    strength: float = Field(0.0, ge=0, le=1)
    linears: Literal["writers", "all"] = "writers"
    residual: Literal[False, True, "relative"] = True
    percdamp: float = Field(0.01, gt=0)


class RefitSpec(_Spec):
    """Tuning of levels, norms and biases once codes are settled: by block, and of the whole model.

    Attributes:
        steps: steps of Adam for each block, one calibration window a step; 0 = off.
        rate: learning rate, as a share of the root mean square of the tensor that learns; it rises
            over the first tenth of the steps and falls to 0 along a cosine.
        towards: what a block reconstructs: the hidden states of the "original" model, or what the
            original "block" makes of the compressed model's.
        model_steps: steps of Adam for all blocks together, one calibration window a step, towards
            the original model's next-token distribution, once every block is done; 0 = off.
        model_rate: its learning rate, like `rate`.
        model_levels: how the levels of a row and column group learn then: each by itself ("free"),
            or a factor for all of them, and each by itself a fifth as fast ("factor").
        model_text: what they learn from then: the "calibration" windows in turn, or at every other
            step a window that the original model wrote, starting from pieces of those ("sampled").
        model_seqlen: a step takes a piece of so many tokens, seen by itself, instead of a window;
            None, or more than half a window: whole windows.
    """

    steps: int = Field(0, ge=0)
    rate: float = Field(0.005, gt=0)
    towards: Literal["original", "block"] = "original"
    model_steps: int = Field(0, ge=0)
    model_rate: float = Field(0.0025, gt=0)
    model_levels: Literal["free", "factor"] = "free"
    model_text: Literal["calibration", "sampled"] = "calibration"
    model_seqlen: int | None = Field(None, ge=2)

    def pieces(self, seqlen: int) -> int:
        """How many pieces a window of so many tokens is cut into, for refitting all blocks."""
        return max(1, seqlen // (self.model_seqlen or seqlen))


class CoarseSpec(_Spec):
    """How the coarse stage shares the budget of kept weights among the decoder blocks.

    Attributes:
        allocation: by layer importance (PBS2P), by the norm of the weights (STBLLM's relative
            importance), half a sine wave falling over the depth, or the same N everywhere; or, not
            by block but by linear, "measured": by what compressing it alone does to the model.
        n_high: the most important (sin: the first) block keeps N + n_high (at most M); measured: no
            linear keeps more.
        n_low: the least important (sin: the last) block keeps N - n_low (at least 1); measured: no
            linear keeps fewer.
    """

    allocation: Literal["layer_importance", "relative_importance", "sin", "uniform", "measured"] = (
        "layer_importance"
    )
    n_high: int = Field(1, ge=0)
    n_low: int = Field(1, ge=0)


class Recipe(_Spec):
    """What to do to a model.

    Attributes:
        name: name of the recipe.
        method: name of the method (see `subbit methods`).
        nm: `(N, M)`, N kept of every M consecutive weights of a row; written `"6:8"`. None,
            written `null`: no weight is pruned, and the coarse stage has nothing to share out.
        blocksize: columns that are compressed together; a multiple of M.
        percdamp: share of mean(diag H) that is added to the diagonal of H.
        levels: how levels are stored: "fp16" parameters as published; "int8" levels on one
            bfloat16 scale for each row and block, smaller, and what the fast kernels read;
            "int8-row", on one scale for each row, smaller still.
        skip: patterns of linears or weights that are left as they are; embeddings and lm_head
            always are.
        calibration: which text the method sees.
        coarse: how the kept weights are shared among the decoder blocks.
        asymmetry: whether targets move towards the original model's outputs; off by default.
        refit: tuning by gradients after compression; off by default.
        options: options of the method; checked by the method itself.

    Raises:
        RecipeError: a key or a value means nothing, or two of them contradict each other.
    """

    name: str
    method: str
    nm: NM
    blocksize: int = Field(128, ge=1)
    percdamp: float = Field(0.01, ge=0)
    levels: Literal["fp16", "int8", "int8-row"] = "fp16"
    skip: list[str] = []
    calibration: CalibrationSpec = CalibrationSpec()
    coarse: CoarseSpec = CoarseSpec()
    asymmetry: AsymmetrySpec = AsymmetrySpec()
    refit: RefitSpec = RefitSpec()
    options: dict[str, Any] = {}

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _explain(error, data.get("name")) from None

    @model_validator(mode="after")
    def _blocks_hold_whole_groups(self) -> Self:
        if self.nm is not None and self.blocksize % self.nm[1]:
            raise ValueError(
                f"blocksize {self.blocksize} is not a multiple of M = {self.nm[1]}, so that N:M "
                "groups would straddle two blocks; choose a multiple of M, such as 128"
            )
        return self

    @model_validator(mode="after")
    def _options_are_plain(self) -> Self:
        for key, value in self.options.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(
                    f"options.{key} is {value!r} but must be made of finite numbers, texts, true, "
                    "false, null, lists and maps"
                ) from None
        return self

    def override(self, settings: Iterable[str]) -> "Recipe":
        """Return a recipe with some values replaced.

        Args:
            settings: `"key=value"`, the value in YAML; the key may be dotted
                (`calibration.nsamples`, `options.tau`). A bare key is looked up in the recipe, in
                `calibration`, `coarse`, `asymmetry` and `refit`; any other is an option of the
                method.

        Raises:
            RecipeError: a setting without `=`, an unknown key, or a value that means nothing.
        """
        data = self.model_dump(mode="json")
        for setting in settings:
            key, equals, text = setting.partition("=")
            if not equals or not key.strip():
                raise RecipeError(f"the setting '{setting}' is not of the form key=value")
            *parents, last = self._locate(key.strip())
            target = data
            for parent in parents:
                target = target.setdefault(parent, {})
                if not isinstance(target, dict):
                    raise RecipeError(f"the setting '{key.strip()}' goes into a key without parts")
            target[last] = _read_yaml(text, f"the setting '{setting}'")
        return Recipe(**data)

    def _locate(self, key: str) -> list[str]:
        if "." in key or key in Recipe.model_fields:
            return key.split(".")
        for part, spec in _PARTS.items():
            if key in spec.model_fields:
                return [part, key]
        if key not in self.options:
            close = difflib.get_close_matches(key, _bare_keys(), n=1, cutoff=0.8)
            if close:
                raise RecipeError(f"unknown setting '{key}'; did you mean '{close[0]}'?")
        return ["options", key]

    def to_yaml(self) -> str:
        """Return the whole recipe as YAML that `load_recipe` reads back to an equal recipe."""
        return recipe_yaml(self.model_dump(mode="json"))


def recipe_yaml(data: dict[str, Any]) -> str:
    """Return a dumped recipe as YAML that `load_recipe` reads back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Return a shipped recipe by name, or read one from a YAML file.

    Raises:
        RecipeError: no such recipe (the nearest name is given), or the file is not a recipe.
    """
    path = Path(name_or_path)
    looks_like_file = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
    if looks_like_file or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"cannot read the recipe file {path}: {reason}") from None
        return _from_text(text, path.stem, f"the recipe file {path}")
    shipped = _shipped()
    if str(name_or_path) not in shipped:
        raise RecipeError(
            f"unknown recipe '{name_or_path}'{nearest(str(name_or_path), shipped)} "
            "(a recipe is a name or a .yaml file)"
        )
    return _from_text(shipped[str(name_or_path)], str(name_or_path), f"recipe {name_or_path}")


def list_recipes() -> list[Recipe]:
    """Return the shipped recipes, sorted by name."""
    return [_from_text(text, name, f"recipe {name}") for name, text in sorted(_shipped().items())]


def _shipped() -> dict[str, str]:
    folder = resources.files("subbit").joinpath("recipes")
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }


def _from_text(text: str, default_name: str, where: str) -> Recipe:
    data = _read_yaml(text, where)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{where} does not hold 'key: value' lines")
    return Recipe(**{"name": default_name, **data})


def _read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "it cannot be read"
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"{where} is not valid YAML{line}: {problem}") from None


def _bare_keys() -> list[str]:
    return [*Recipe.model_fields, *(key for spec in _PARTS.values() for key in spec.model_fields)]


# percdamp of the asymmetry is the recipe's own key, so it is looked up there first
_PARTS: dict[str, type[_Spec]] = {
    "calibration": CalibrationSpec,
    "coarse": CoarseSpec,
    "asymmetry": AsymmetrySpec,
    "refit": RefitSpec,
}


def _explain(error: ValidationError, name: object) -> RecipeError:
    """Turn the first complaint of pydantic into one sentence."""
    first = error.errors(include_url=False)[0]
    recipe = f"recipe '{name}'" if isinstance(name, str) else "the recipe"
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _PARTS[path[0]].model_fields if len(path) > 1 else Recipe.model_fields
        return RecipeError(f"{recipe} has an unknown key '{key}'{nearest(path[-1], known)}")
    if first["type"] == "missing":
        return RecipeError(f"{recipe} lacks the key '{key}'")
    if first["type"] == "value_error":
        return RecipeError(f"{recipe}: {first['ctx']['error']}")
    reason = first["msg"][0].lower() + first["msg"][1:]
    return RecipeError(f"{recipe}: {key} is {first['input']!r} but {reason}")
