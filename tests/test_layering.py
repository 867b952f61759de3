"""The arrows of import between the rooms of the package, read from its source: lazy imports count too."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import curvlinops

PACKAGE = Path(curvlinops.__file__).parent

#: Which rooms a room may import, besides itself. "public" stands for the names of ``curvlinops.__all__``.
ALLOWED: dict[str, set[str]] = {
    "memory": set(),
    "operators": {"memory"},
    "risk": {"memory"},
    "curvature": {"memory", "operators", "risk"},
    "solvers": {"memory", "operators"},
    "estimators": {"operators", "solvers"},
    "applications": {"public"},
    # Modules beside the rooms: they stand above all of them, and no room may import them.
    "examples": {"operators", "risk", "curvature", "solvers", "public"},
    "plotting": {"estimators", "public"},
    "__init__": {"operators", "risk", "curvature", "solvers", "estimators", "applications"},
}
RUNTIME_PACKAGES = {"torch", "backpack", "einops", "scipy", "numpy", "tqdm"}
OPTIONAL_PACKAGES = {"plotting": {"matplotlib"}}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The first folder below the package, or the module's own name."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def package_of(path: Path) -> list[str]:
    """The dotted package that relative imports of a file start from."""
    return ["curvlinops", *path.relative_to(PACKAGE).parent.parts]


def imported_modules(source: str, package: list[str]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything imported, anywhere in the source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _is_dynamic_import(node.func):
            values = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from ((node.lineno, value) for value in values)


def _is_dynamic_import(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def target_of(module: str) -> str | None:
    """The room that an imported name belongs to; None where it is not of this package."""
    parts = module.split(".")
    if parts[0] != "curvlinops":
        return None
    is_room = len(parts) > 1 and ((PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").exists())
    return parts[1] if is_room or (len(parts) > 1 and parts[1] in ALLOWED) else "public"


def wrong_arrows(room: str, source: str, package: list[str]) -> list[str]:
    """The imports of a source that its room may not make."""
    allowed = {room} | ALLOWED[room]
    found = [(line, module, target_of(module)) for line, module in imported_modules(source, package)]
    return [f"line {line}: {module}" for line, module, target in found if target is not None and target not in allowed]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"{room} is a new room: say in ALLOWED what it may import"
    wrong = wrong_arrows(room, path.read_text(), package_of(path))
    assert not wrong, f"{path.relative_to(PACKAGE)} imports what {room} may not: {wrong}"


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("operators", "from curvlinops.risk.model import FunctionalModel"),
        ("operators", "def f():\n    from curvlinops.solvers import inverse"),
        ("operators", "import curvlinops"),
        ("operators", "from curvlinops import Diagonal"),
        ("operators", "from curvlinops import risk"),
        ("operators", "from ..risk import model"),
        ("operators", "from .. import risk"),
        ("operators", "if TYPE_CHECKING:\n    import curvlinops.curvature.base as b"),
        ("operators", "import importlib\nimportlib.import_module('curvlinops.risk')"),
        ("risk", "from curvlinops.operators.space import Space"),
        ("curvature", "from curvlinops.solvers.inverse import CGInverseLinearOperator"),
        ("curvature", "import curvlinops.examples"),
        ("solvers", "from curvlinops.curvature.base import CurvatureLinearOperator"),
        ("solvers", "from curvlinops.risk import losses"),
        ("estimators", "from curvlinops.curvature import ggn"),
        ("applications", "from curvlinops.curvature.ggn import GGNLinearOperator"),
    ],
)
def test_wrong_arrows_are_seen(room: str, source: str) -> None:
    assert wrong_arrows(room, source, ["curvlinops", room])


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("operators", "import torch\nfrom . import space\nfrom curvlinops.operators.base import LinearOperator"),
        ("curvature", "from curvlinops.operators.base import LinearOperator\nfrom ..risk import model"),
        ("solvers", "def f():\n    from curvlinops.operators import space"),
        ("estimators", "from curvlinops.solvers.krylov import lanczos"),
        ("applications", "from curvlinops import GGNLinearOperator\nfrom curvlinops.applications import merging"),
    ],
)
def test_right_arrows_are_let_through(room: str, source: str) -> None:
    assert not wrong_arrows(room, source, ["curvlinops", room])


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_declared_packages_are_imported(path: Path) -> None:
    known = {"curvlinops", *sys.stdlib_module_names} | RUNTIME_PACKAGES | OPTIONAL_PACKAGES.get(room_of(path), set())
    found = {module.split(".")[0] for _, module in imported_modules(path.read_text(), package_of(path))}
    assert found <= known, f"{path.relative_to(PACKAGE)} imports {sorted(found - known)}"


# -- one place each ----------------------------------------------------------------------------------------------------


def places(matches: str) -> set[str]:
    """The modules in which an expression of this text occurs."""
    found = set()
    for path in sources():
        texts = (ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if any(matches in text for text in texts):
            found.add(path.relative_to(PACKAGE).as_posix())
    return found


def test_one_place_converts_to_numpy() -> None:
    assert places(".numpy()") == {"operators/scipy_adapter.py"}


def test_one_place_reduces_over_processes() -> None:
    found = places("all_reduce(")
    assert found and all(place.startswith("risk/") for place in found), found


def test_one_room_knows_the_losses() -> None:
    names = ("CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss")
    for path in sources():
        if path.relative_to(PACKAGE).as_posix().startswith(("risk/losses/", "applications/fishleg/likelihoods")):
            continue  # the latter builds the losses that belong to likelihoods; it does not ask which one it got
        used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        used |= {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not used & set(names), f"{path.relative_to(PACKAGE)} knows {sorted(used & set(names))}"


def test_package_module_has_names_only() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    kinds = [type(node).__name__ for node in body]
    assert kinds[0] == "Expr" and kinds[-1] == "Assign" and set(kinds[1:-1]) == {"ImportFrom"}
