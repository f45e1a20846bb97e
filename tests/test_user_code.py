"""A user's own model, objective and tasks train by name alone."""

import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distmaml import adapter, loop, paths, rehearsal
from distmaml.config import Config
from distmaml.datasets import ensure_store
from distmaml.episodes import Batch
from distmaml.errors import ConfigError
from distmaml.limits import check
from distmaml.worker import LocalWorker
from tests.runs import waves

USER_CODE = Path(__file__).parent / "user_code" / "waves.py"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of the user's in the working directory, which distmaml has never heard of."""
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "__init__.py").touch()
    shutil.copy(USER_CODE, tmp_path / "their_package" / "waves.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the working directory leaves it again
    yield "their_package.waves"
    for name in [name for name in sys.modules if name.split(".")[0] == "their_package"]:
        del sys.modules[name]


def settings(folder: Path, package: str, **changes: Any) -> Config:
    theirs = {
        "tasks": f"{package}:SquareWaves", "task_arguments": {"num_queries": 6}, "model": f"{package}:network",
        "model_arguments": {"width": 9}, "objective": f"{package}:robust_regression",
    }  # fmt: skip
    return waves(folder, "theirs", **{**theirs, **changes})


def test_model_objective_and_tasks_of_a_user_train_by_their_names(package: str, tmp_path: Path) -> None:
    config = settings(tmp_path, package)
    check(config)
    found = loop.train(config, LocalWorker())
    assert found["step"] == 20
    assert 0 <= found["query_within_half"] <= 1
    assert math.isfinite(found["best/query_loss"])
    scores = loop.evaluate(config, LocalWorker()).scores["transductive"]
    assert set(scores) == {"query_loss", "query_within_half"}


def test_the_result_is_loaded_with_the_users_code_in_hand_and_never_by_its_name(package: str, tmp_path: Path) -> None:
    from distmaml.build import import_attribute

    config = settings(tmp_path, package, num_outer_steps=2)
    loop.train(config, LocalWorker())
    file = paths.model(paths.run_folder(config))
    theirs = {name: import_attribute(f"{package}:{name}") for name in ("network", "robust_regression", "SquareWaves")}
    with pytest.raises(ConfigError, match=r"load\(path, model=\.\.\., objective=\.\.\.\)"):
        adapter.load(file)
    model = adapter.load(file, model=lambda: theirs["network"](width=9), objective=theirs["robust_regression"])
    task = theirs["SquareWaves"](split="test", seed=0).sample([0])
    values = model.adapt(Batch(task.support.inputs[0], task.support.targets[0])).predict(task.query.inputs[0])
    assert values.shape == (10, 1)
    assert bool(torch.isfinite(values).all())


@pytest.mark.parametrize(
    ("name", "said"),
    [("nowhere.at_all:network", "cannot be imported"), ("their_package.waves:netwrk", "no attribute 'netwrk'")],
)
def test_a_name_that_leads_nowhere_is_refused(package: str, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        loop.train(settings(tmp_path, package, model=name), LocalWorker())


@pytest.mark.parametrize(
    ("code", "changes", "said"),
    [
        ("def f(:", {"model": "theirs:f"}, r"'theirs:f' cannot be imported: SyntaxError"),
        ("import sys; sys.exit('no')", {"model": "theirs:f"}, r"SystemExit: no \(.*theirs\.py, line 1\)"),
        ("None.x", {"model": "theirs:f"}, r"cannot be imported: AttributeError: .*theirs\.py, line 1"),
        ("def f(**_): return {}['a']", {"model": "theirs:f"}, r"KeyError: 'a' \(.*theirs\.py, line 1\)"),
        ("def f(**_): return {}['a']", {"tasks": "theirs:f"}, r"KeyError: 'a' \(.*theirs\.py, line 1\)"),
        ("def f(**_): return None", {"tasks": "theirs:f"}, r"AttributeError: 'NoneType' object has no"),
        (
            "from distmaml import objective\n"
            "def f(module): return objective(module, lambda a, b: ((a - b).square().mean(), {}), metrics=('hits',))",
            {"objective": "theirs:f"}, r"objective='theirs:f' names the metrics \['hits'\], and its loss returns \[\]",
        ),
        ("def f(module): assert False, 'never'", {"objective": "theirs:f"}, r"AssertionError: never \(.*theirs\.py"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_users_code_is_one_line_that_says_where(
    package: str, tmp_path: Path, code: str, changes: dict[str, Any], said: str
) -> None:
    (tmp_path / "theirs.py").write_text(code)
    try:
        with pytest.raises(ConfigError, match=said):
            rehearsal.rehearse(settings(tmp_path, package, **changes))
    finally:
        sys.modules.pop("theirs", None)


def test_a_builder_that_dies_midway_leaves_no_store(tmp_path: Path) -> None:
    def half(path: Path, **_: Any) -> None:
        path.write_bytes(b"ARROW1")
        raise OSError("the network is gone")

    for _ in range(2):
        with pytest.raises(OSError, match="the network is gone"):
            ensure_store(
                "their:half", data_dir=None, image_size=8, color=False, stores_dir=tmp_path, builder=half,  # type: ignore[arg-type]
            )  # fmt: skip
    assert [file.suffix for file in tmp_path.iterdir()] == [".lock"]


def test_a_factory_that_returns_no_module_is_refused(package: str, tmp_path: Path) -> None:
    config = settings(tmp_path, package, model="builtins:dict", model_arguments={"width": 3})
    with pytest.raises(ConfigError, match=r"returned a dict, not a torch\.nn\.Module"):
        loop.train(config, LocalWorker())
