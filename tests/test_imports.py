"""Imports point one way, and what is heavy stays where it belongs."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distmaml

ROOT = Path(distmaml.__file__).parent
LAYERS = [
    ["errors"],
    ["arrow_file", "files", "interrupt", "kernels", "options", "splits", "trees"],
    ["conjugate_gradient", "remote"],
    ["episodes", "inner", "journal", "models", "segments", "worker"],
    ["chain", "engine", "store"],
    ["convolution"],
    ["chain_loss", "objectives"],
    ["algorithms", "datasets"],
    ["config"],
    ["limits"],
    [
        "checkpoint",
        "collectives",
        "gpu",
        "machine",
        "meter",
        "outer",
        "paths",
        "prefetch",
        "published",
        "recipes",
        "scoring",
        "selection",
        "space",
        "tasks",
    ],
    ["build", "mirror", "plans", "population", "rows", "searchers"],
    ["adapter", "evaluation", "pictures", "recorder", "table", "tracking"],
    ["loop", "ray_cluster", "supervisor"],
    ["comparison", "findings", "launch", "preflight", "progress", "rehearsal", "report", "search"],
    ["board", "experiment", "workers"],
    ["trial"],
    ["trials"],
    ["driver", "study"],
    ["reproduction"],
    ["cli"],
]
"""From the lowest up: a module imports from layers below its own alone."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY_IN = {
    "mlflow": {"tracking"},
    "ray": {"launch", "ray_cluster", "search", "supervisor"},
    "matplotlib": {"pictures"},
    "plotly": {"pictures"},
    "torch.distributed": {"collectives"},
    "optuna": {"searchers"},
    "numba": {"kernels"},
    "pickle": set[str](),
}
"""A package, and the only units that may import it."""


def unit(path: Path) -> str:
    """The module or package just below distmaml that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


FILES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, also inside a function; ``from distmaml import x`` is distmaml.x."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imported(path) if name.startswith("distmaml.")}
    return names - {unit(path)}


def test_every_module_has_a_layer() -> None:
    assert {unit(path) for path in FILES} <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_lower_layers_alone(path: Path) -> None:
    too_high = {name for name in ours(path) if LEVEL[name] >= LEVEL[unit(path)]}
    assert not too_high


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_has_a_home_is_imported_only_there(path: Path) -> None:
    for name in imported(path):
        for package, homes in ONLY_IN.items():
            assert not f"{name}.".startswith(f"{package}.") or unit(path) in homes


def test_launch_is_handed_the_loop_and_never_names_meta_learning() -> None:
    assert ours(ROOT / "launch.py") | ours(ROOT / "ray_cluster.py") | ours(ROOT / "search.py") | ours(
        ROOT / "supervisor.py"
    ) <= {
        *("errors", "worker", "ray_cluster", "supervisor"),
    }


def test_the_configuration_needs_no_torch() -> None:
    assert not [name for name in imported(ROOT / "config.py") if name.split(".")[0] in ("torch", "numpy")]


def loaded_by(code: str) -> set[str]:
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in found.stdout.split()}


def test_the_package_alone_loads_neither_torch_nor_ray() -> None:
    loaded = loaded_by("import distmaml\nfrom distmaml import Config, RECIPES, override\nprint(distmaml.__version__)")
    assert not loaded & {"torch", "ray", "mlflow", "numpy", "matplotlib"}


def test_the_loop_loads_neither_ray_nor_mlflow_nor_matplotlib() -> None:
    loaded = loaded_by("import distmaml.loop")
    assert "torch" in loaded
    assert not loaded & {"ray", "mlflow", "matplotlib", "plotly"}


def test_what_a_worker_imports_with_the_drivers_functions_has_no_pictures() -> None:
    loaded = loaded_by("import distmaml.driver, distmaml.study")
    assert not loaded & {"ray", "mlflow", "matplotlib", "plotly", "optuna"}


# ------------------------------------------------------------------------------------- the public names


@pytest.mark.parametrize("name", distmaml.__all__)
def test_a_public_name_is_there_and_described(name: str) -> None:
    value = getattr(distmaml, name)
    assert value == getattr(distmaml, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)


def test_type_checkers_are_told_the_names_that_exist() -> None:
    """The imports that only a type checker sees, the table and __all__ say the same."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        (str(node.module).removeprefix("distmaml."), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {(module, name) for name, module in distmaml._HOMES.items()}
    assert sorted(distmaml.__all__) == sorted([*distmaml._HOMES, "__version__"])
    assert len(set(distmaml.__all__)) == len(distmaml.__all__)


def test_a_public_name_is_no_submodule() -> None:
    """Importing the submodule would put it in the name's place."""
    assert not {unit(path) for path in FILES} & set(distmaml.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'mamel'"):
        distmaml.mamel  # noqa: B018
