"""A checkpoint is read back as it was written, or refused with a reason."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distmaml import checkpoint
from distmaml.errors import CheckpointError, RunError

TENSORS = {
    "meta_params/w": torch.randn(3, 4),
    "meta_params/double": torch.randn(2, dtype=torch.float64),
    "optimizer/step/w": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
}
DOCUMENT = {"step": 3, "best": 0.1 + 0.2, "nested": {"name": "ünïcode", "none": None}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "one.safetensors", TENSORS, DOCUMENT)
    return tmp_path / "one.safetensors"


def test_tensors_and_document_come_back_to_the_last_bit(path: Path) -> None:
    tensors, document = checkpoint.load(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[n], t) and tensors[n].dtype == t.dtype for n, t in TENSORS.items())
    assert document == {"format": 1, **DOCUMENT}


def test_transposed_and_graph_bearing_tensors_are_written(tmp_path: Path) -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    checkpoint.save(tmp_path / "x.safetensors", {"w": weight.T}, {})
    assert torch.equal(checkpoint.load(tmp_path / "x.safetensors")[0]["w"], weight.detach().T)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, -100, -9, -1])
def test_a_truncated_file_is_refused(path: Path, kept: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        checkpoint.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*none\.safetensors"):
        checkpoint.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"distmaml": "[1]"}, {"distmaml": "{}"}])
def test_a_foreign_safetensors_file_is_refused(tmp_path: Path, metadata: Any) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, metadata)
    with pytest.raises(CheckpointError, match="not written by distmaml"):
        checkpoint.load(path)


def test_a_header_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, {"distmaml": "{"})
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_another_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "later.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, {"distmaml": json.dumps({"format": 99})})
    with pytest.raises(CheckpointError, match="format 99; this version of distmaml reads format 1"):
        checkpoint.load(path)


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trap-was-sprung",)


def test_a_pickle_is_refused_and_nothing_in_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(path)
    torch.save({"w": torch.zeros(1), "trap": _Trap()}, path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(path)
    assert not (tmp_path / "trap-was-sprung").exists()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    before = path.read_bytes()
    blocker = path.parent / "folder.safetensors"
    (blocker / "in the way").mkdir(parents=True)  # a file cannot take the name of a folder that is not empty
    with pytest.raises(RunError, match=r"cannot write .*folder\.safetensors"):
        checkpoint.save(blocker, TENSORS, DOCUMENT)
    with pytest.raises(TypeError):  # a document that is no JSON fails before anything is opened
        checkpoint.save(path, TENSORS, {"step": object()})
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["folder.safetensors", "one.safetensors"]


def test_newest_is_the_highest_step_that_is_whole(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (9, 10, 100):
        checkpoint.save(checkpoint.path_of(tmp_path, step), TENSORS, {"step": step})
    assert checkpoint.newest(tmp_path) == 100
    broken = checkpoint.path_of(tmp_path, 100)
    broken.write_bytes(broken.read_bytes()[:-1])
    assert checkpoint.newest(tmp_path) == 10
    assert checkpoint.steps(tmp_path) == [9, 10, 100]  # looking changes nothing


def test_a_checkpoint_of_another_format_is_not_passed_over(tmp_path: Path) -> None:
    checkpoint.save(checkpoint.path_of(tmp_path, 9), TENSORS, {"step": 9})
    later = checkpoint.path_of(tmp_path, 10)
    safetensors.torch.save_file({"w": torch.zeros(1)}, later, {"distmaml": json.dumps({"format": 99})})
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.newest(tmp_path)


def test_a_folder_of_damaged_checkpoints_is_no_fresh_start(tmp_path: Path) -> None:
    for step in (5, 10):
        checkpoint.path_of(tmp_path, step).write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged"):
            checkpoint.newest(tmp_path)
