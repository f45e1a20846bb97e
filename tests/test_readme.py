"""What the README shows in Python does run."""

import re
from pathlib import Path

import pytest
from PIL import Image

README = Path(__file__).parent.parent / "README.md"


def block(holds: str) -> str:
    """The one block of Python in which a text stands."""
    (found,) = [code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if holds in code]
    return str(found)


def test_the_meta_gradient_of_ones_own_module() -> None:
    names: dict[str, object] = {}
    exec(block("meta_gradient"), names)
    assert names["step"] == 9


def test_a_run_without_ray_and_its_result(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "distmaml").mkdir()
    (tmp_path / "distmaml" / "stores").symlink_to(prepared / "stores")
    shorter = '"num_outer_steps": 1, "num_val_episodes": 2, "num_test_episodes": 2'
    exec(block("LocalWorker").replace('"num_outer_steps": 20, "num_test_episodes": 20', shorter), {})
    assert capsys.readouterr().out.count("Interval(mean=") == 4  # before adaptation and after each of three steps

    for name in ("sun", "spade", "note", "new"):
        Image.new("L", (40, 40), 200).save(f"{name}.jpg")
    names: dict[str, object] = {}
    exec(block("read_pictures").replace("runs/first", "runs/here"), names)
    probabilities = names["probabilities"]
    assert list(probabilities.shape) == [1, 5]  # type: ignore[attr-defined]
    assert probabilities[0, 3:].tolist() == [0, 0]  # type: ignore[index]
