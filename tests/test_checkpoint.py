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
from distmaml.errors import CheckpointError, DamagedError, RunError

TENSORS = {
    "meta_params/w": torch.randn(3, 4),
    "meta_params/double": torch.randn(2, dtype=torch.float64),
    "optimizer/step/w": torch.tensor(7.0),
    "empty": torch.zeros(0, 3),
}
ORIGIN: dict[str, Any] = {
    "config": {"recipe": "ünïcode", "clip_norm": None},
    "shapes": {"input_shape": [1], "num_outputs": 1},
    "dataset": None,
}
DOCUMENT = {"step": 3, "best": 0.1 + 0.2, "stale": 0, **ORIGIN}


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
    checkpoint.save(tmp_path / "x.safetensors", {"w": weight.T}, DOCUMENT)
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", None),
        ("step", -1),
        ("step", 2.0),
        ("step", True),
        ("step", 2**63),
        ("config", ["maml"]),
        ("shapes", {"input_shape": [1]}),
        ("shapes", {"input_shape": [1, -8, 8], "num_outputs": 3}),
        ("shapes", {"input_shape": [1], "num_outputs": "x"}),
        ("dataset", {}),
        ("dataset", {"content_hash": "0", "split_hash": 7, "ink": True}),
        ("dataset", {"content_hash": "0", "split_hash": "7", "ink": 1}),
    ],
)
def test_a_document_without_what_a_run_writes_is_refused_by_the_field(path: Path, field: str, value: Any) -> None:
    checkpoint.save(path, TENSORS, {**DOCUMENT, field: value})
    with pytest.raises(DamagedError, match=rf"'{field}' in its header is .*, but must be "):
        checkpoint.load(path)
    checkpoint.save(path, TENSORS, {name: value for name, value in DOCUMENT.items() if name != field})
    with pytest.raises(DamagedError, match=rf"'{field}' in its header is missing"):
        checkpoint.load(path)


def test_what_an_error_shows_of_a_file_is_one_short_line(path: Path) -> None:
    checkpoint.save(path, TENSORS, {**DOCUMENT, "step": ["\n" * 10_000] * 1000})
    with pytest.raises(DamagedError) as caught:
        checkpoint.load(path)
    assert len(str(caught.value).removeprefix(str(path)).splitlines()) == 1
    assert len(str(caught.value).removeprefix(str(path))) < 200


def raw(path: Path, header: Any, data: bytes = b"") -> None:
    """A safetensors file that says what it likes."""
    text = json.dumps({"__metadata__": {"distmaml": json.dumps({"format": 1, **DOCUMENT})}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([2**40, 2**10], [0, 2**52]),
        ([2**62, 4], [0, 8]),
        ([2**63, 0], [0, 0]),
        ([-1], [0, 4]),
        ([3], [0, 8]),
        ([2], [4, 12]),
        ([2], [8, 0]),
    ],
)
def test_a_size_that_is_not_that_of_the_data_is_refused(path: Path, shape: list[int], offsets: list[int]) -> None:
    raw(path, {"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}, bytes(8))
    with pytest.raises(DamagedError, match="damaged"):
        checkpoint.load(path)


def test_tensors_that_share_their_bytes_are_refused(path: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    raw(path, {"w": one, "v": one}, bytes(8))
    with pytest.raises(DamagedError, match="damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, '{"format": 1, "step": ' + "9" * 5000 + "}"])
def test_json_that_no_parser_follows_is_refused(path: Path, text: str) -> None:
    safetensors.torch.save_file({"w": torch.zeros(1)}, path, {"distmaml": text})
    with pytest.raises(DamagedError, match="damaged"):
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
        checkpoint.save(checkpoint.path_of(tmp_path, step), TENSORS, {**DOCUMENT, "step": step})
    assert checkpoint.newest(tmp_path) == 100
    broken = checkpoint.path_of(tmp_path, 100)
    broken.write_bytes(broken.read_bytes()[:-1])
    assert checkpoint.newest(tmp_path) == 10
    assert checkpoint.steps(tmp_path) == [9, 10, 100]  # looking changes nothing


def test_a_model_in_the_place_of_a_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpoint.save(checkpoint.path_of(tmp_path, 9), TENSORS, DOCUMENT)
    model = {"step": 10, **ORIGIN, "selection_metric": "val/query_accuracy", "value": 0.5}
    checkpoint.save(checkpoint.path_of(tmp_path, 10), {"w": torch.zeros(1)}, model)
    assert checkpoint.newest(tmp_path) == 9


def test_a_checkpoint_of_another_format_is_not_passed_over(tmp_path: Path) -> None:
    checkpoint.save(checkpoint.path_of(tmp_path, 9), TENSORS, DOCUMENT)
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
