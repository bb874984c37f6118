"""The plan of the house holds: every import is an arrow that docs/architecture.md allows."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "subbit"

# room -> the rooms it may import; the same table as in docs/architecture.md
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "quiet": set(),
    "places": {"errors"},
    "codes": set(),
    "recipe": {"errors"},
    "text": {"errors"},
    "linalg": {"errors"},
    "model": {"linalg", "places", "quiet", "errors"},
    "prune": {"linalg", "errors"},
    "binarize": {"linalg", "codes", "errors"},
    "methods": {"linalg", "prune", "binarize", "codes", "errors"},
    "packed": {"codes", "errors"},
    "hub": {"packed", "recipe", "codes", "places", "quiet", "errors"},
    "run": {"errors"},
    "evaluate": {"packed", "hub", "text", "model", "errors"},
}
ROOMS["calibration"] = {"linalg", "model", "recipe", "errors"}
ROOMS["coarse"] = {"linalg", "methods", "model", "prune", "recipe", "errors"}
ROOMS["lessons"] = {"model", "recipe", "run", "text"}
ROOMS["refit"] = {"model", "packed", "codes", "recipe", "errors"}
ROOMS["committed"] = {"model", "packed", "recipe", "refit", "run"}
ROOMS["result"] = {"hub", "recipe", "run"}
ROOMS["job"] = set(ROOMS) - {"evaluate"}
ROOMS["compression"] = set(ROOMS) - {"evaluate"}
ROOMS["study"] = set(ROOMS)
EVERYTHING = {"__init__", "cli", "demo"}  # these may import any room, but only inside functions
ROOMS |= {room: set(ROOMS) | EVERYTHING for room in EVERYTHING}

TRANSFORMERS = {"model", "text", "hub", "evaluate", "quiet"}
TORCH_ONLY = {"linalg", "packed"}
TRITON = (
    "triton",
    "triton_kernels.py",
)  # the one file that may, and that is imported only for a GPU
NOT_TO_LOAD = ("methods", "text", "model", "study")


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Absolute module names that a file imports, with the line, and whether inside a function.

    What stands under `if TYPE_CHECKING:` is never run; there, types of other packages are free.
    """
    package = ["subbit", *path.relative_to(SOURCE).parent.parts]
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                before = len(found)
                visit(child, inside)
                ours = [entry for entry in found[before:] if entry[0].startswith("subbit")]
                found[before:] = ours
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = package[: len(package) - child.level + 1] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                names = [f"{base}.{alias.name}" for alias in child.names]
                found.extend((name, child.lineno, inside) for name in names)
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            visit(child, inside or function)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


FILES = sorted(SOURCE.rglob("*.py"))


def test_there_is_something_to_read():
    assert len(FILES) >= 5
    for path in FILES:
        assert room_of(path) in ROOMS, f"{path} is in no room of docs/architecture.md"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_only_allowed_arrows(path: Path):
    room = room_of(path)
    for name, line, inside in imports(path):
        parts = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if parts[0] == "subbit":
            target = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"
            if target == "__init__":  # of the package itself only its version is anyone's to take
                assert parts[1:] in ([], ["__version__"]) or room in EVERYTHING, where
                continue
            assert target == room or target in ROOMS[room], where
            light = target in {"errors", "recipe"} or name.startswith("subbit.hub.hook")
            assert room not in EVERYTHING or inside or light, f"{where} at the top of the file"
        if parts[0] == "transformers":
            assert room in TRANSFORMERS, where
            continue
        if room in TORCH_ONLY and parts[0] not in sys.stdlib_module_names | {"subbit"}:
            assert parts[0] == "torch" or (parts[0], path.name) == TRITON, where
        if room in EVERYTHING:
            heavy = parts[0] in {"torch", "datasets", "numpy", "gguf"}
            assert inside or not heavy, f"{where} at the top of the file"


def test_the_document_has_the_same_table():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    documented: dict[str, str] = {}
    for row in rows:
        names = [name.strip("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", row[1])]
        rooms = [name for name in names if not name.startswith("recipes")]
        documented |= {room: row[-2] for room in rooms}
    assert set(documented) | {"demo"} == set(ROOMS)
    for room, cell in documented.items():
        named = set(re.findall(r"`([^`]+)`", cell))
        if named and "below" not in cell:
            assert named == ROOMS[room], f"docs/architecture.md and this test differ on {room}"
        if cell.strip() == "–":
            assert ROOMS[room] == set()
        assert named <= ROOMS[room], room


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


@pytest.mark.parametrize("module", ["subbit", "subbit.cli", "subbit.recipe", "subbit.errors"])
def test_light_to_import(module: str):
    heavy = {"torch", "transformers", "datasets", "numpy"}
    assert not heavy & loaded_by(f"import {module}")


def test_loading_needs_no_method_text_model_or_study():
    if not (SOURCE / "hub" / "load.py").is_file():
        pytest.skip("hub/load.py is not written yet")
    loaded = loaded_by("import subbit.hub.load")
    assert "subbit.hub.load" in loaded
    for room in NOT_TO_LOAD:
        assert not [name for name in loaded if name.split(".")[:2] == ["subbit", room]]


def test_every_header_of_the_kernel_is_named():
    """Setuptools takes no pattern; one left out would be missing from a source distribution."""
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (kernel,) = (e for e in built["ext-modules"] if e["name"] == "subbit.packed.kernels._b3")
    headers = (SOURCE / "packed" / "kernels").rglob("*.h")
    assert sorted(kernel["depends"]) == sorted(h.relative_to(ROOT).as_posix() for h in headers)
