"""What this project adds to the paper: its ingredients one by one, and what stored bits buy."""

from subbit.study.cells import Cell, Protocol

__all__ = ["IMPROVEMENTS"]

_LIGHT = Protocol(nsamples=8, windows=10)
_PLUS = "pbs2p-plus-6-8"

# The recipe pbs2p-plus-6-8 with everything of ours off, in the order in which it comes back
_OFF = {
    "codebook": "groups",
    "compensation": "diagonal",
    "objective": "gram",
    "sweeps": "0",
    "remask": "false",
    "passes": "0",
    "free_levels": "6",
    "levels": "fp16",
    "calibration.sequential": "false",
    "calibration.first_token": "1",
    "asymmetry.strength": "0",
    "asymmetry.linears": "writers",
}
_ROWS: list[tuple[str, dict[str, str | None]]] = [  # name, what changes; None = as in the recipe
    ("one-shot", {"spbo": "false"}),
    ("spbo", {"spbo": None}),
    ("exact-compensation", {"compensation": None}),
    ("descent", {"sweeps": "3"}),
    ("schur", {"objective": None}),
    ("free-levels", {"codebook": None, "sweeps": None}),
    ("remask", {"remask": None}),
    ("passes", {"passes": None}),
    ("seven-levels", {"free_levels": None}),
    ("int8", {"levels": None}),
    ("sequential", {"calibration.sequential": None}),
    ("first-token", {"calibration.first_token": None}),
    ("asymmetric", {"asymmetry.strength": None}),
    ("all-linears", {"asymmetry.linears": None}),
]


def _ablation() -> list[Cell]:
    """Each row adds to the one before it: up to the recipe, then up to that with gradients."""
    cells, now = [], dict(_OFF)
    for name, changes in _ROWS:
        for key, value in changes.items():
            now.pop(key, None)
            if value is not None:
                now[key] = value
        cells.append(Cell(name, _PLUS, [f"{key}={value}" for key, value in now.items()]))
    refit = "pbs2p-plus-refit-6-8"
    return [*cells, Cell("refit-blocks", refit, ["refit.model_steps=0"]), Cell("refit", refit)]


_CHOICES = {
    "recipe": [],
    "strength-0": ["asymmetry.strength=0"],
    "strength-0.2": ["asymmetry.strength=0.2"],
    "strength-0.5": ["asymmetry.strength=0.5"],
    "strength-0.8": ["asymmetry.strength=0.8"],
    "strength-1": ["asymmetry.strength=1"],
    "writers": ["asymmetry.linears=writers"],
    "outputs": ["calibration.outputs=gradient"],
    "no-residual": ["asymmetry.residual=false"],
    "relative-residual": ["asymmetry.residual=relative"],
    "relative-tokens": ["calibration.tokens=relative"],
    "gradient-tokens": ["calibration.tokens=gradient", "calibration.first_token=1"],
    "gradient-and-first-token": ["calibration.tokens=gradient"],
    "first-token-1": ["calibration.first_token=1"],
    "first-token-100": ["calibration.first_token=100"],
    "not-sequential": ["calibration.sequential=false"],
    "6-levels": ["free_levels=6"],
    "8-levels": ["free_levels=8"],
    "fp16-levels": ["levels=fp16"],
    "no-passes": ["passes=0"],
    "measured": ["coarse.allocation=measured", "coarse.n_high=4", "coarse.n_low=2"],
    "layer-importance": ["coarse.allocation=layer_importance"],
    "towards-block": ["refit.steps=64", "refit.rate=0.01", "refit.towards=block"],
    "towards-original": ["refit.steps=64", "refit.rate=0.01"],
    "model-alone": ["refit.model_steps=64"],
    "32-samples": ["calibration.nsamples=32"],
    "64-samples": ["calibration.nsamples=64"],
}

# The target of pbs2p-plus with other methods; at strength 1 it is what GPTAQ aims at
_SEQUENTIAL = ["calibration.sequential=true"]
_ASYMMETRIC = [*_SEQUENTIAL, "asymmetry.strength=0.3", "asymmetry.linears=all"]
_OTHERS = [
    cell
    for recipe in ("gptq-3", "arb-rc", "pbs2p-6-8")
    for cell in (
        Cell(recipe, recipe),
        Cell(f"{recipe}-sequential", recipe, _SEQUENTIAL),
        Cell(f"{recipe}-asymmetric", recipe, _ASYMMETRIC),
        Cell(f"{recipe}-asymmetric-1", recipe, [*_ASYMMETRIC, "asymmetry.strength=1"]),
    )
]

_BITS = (
    "gptq-2", "gptq-3", "gptq-4", "pbs2p-4-8", "pbs2p-5-8", "pbs2p-6-8",
    "pbs2p-plus-binary", "pbs2p-plus-binary-5-8", "pbs2p-plus-ternary", "pbs2p-plus-4-levels",
    "pbs2p-plus-8-levels", "pbs2p-plus-4-8", "pbs2p-plus-5-8", "pbs2p-plus-6-8",
    "pbs2p-plus-refit-4-8", "pbs2p-plus-refit-5-8", "pbs2p-plus-refit-6-8",
)  # fmt: skip

IMPROVEMENTS: dict[str, tuple[str, Protocol, list[Cell]]] = {
    "ablation": (
        "From PBS2P to pbs2p-plus at 6:8, one ingredient a row, 8 x 2048 calibration tokens",
        _LIGHT,
        _ablation(),
    ),
    "choices": (
        "What the choices of pbs2p-plus-6-8 are worth, one change a row, 8 x 2048 calibration "
        "tokens",
        _LIGHT,
        [
            *(Cell(name, _PLUS, changes) for name, changes in _CHOICES.items()),
            Cell("4-8-uniform", "pbs2p-plus-4-8"),
            Cell("4-8-measured", "pbs2p-plus-4-8", _CHOICES["measured"]),
            Cell("4-8-relative-residual", "pbs2p-plus-4-8", _CHOICES["relative-residual"]),
            *_OTHERS,
        ],
    ),
    "pareto": (
        "Perplexity against stored bits, 32 x 2048 calibration tokens",
        Protocol(),
        [
            Cell("original", None),
            *(Cell(name, name) for name in _BITS),
            Cell("pbs2p-plus-4-levels-6-8", "pbs2p-plus-4-levels", ["nm=6:8"]),
            Cell("pbs2p-plus-6-levels", "pbs2p-plus-8-levels", ["free_levels=6"]),
        ],
    ),
}
