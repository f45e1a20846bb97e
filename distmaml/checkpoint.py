"""Tensors and what belongs to them in one file: no pickle, written as a whole or not at all.

A file is safetensors (https://github.com/huggingface/safetensors) with one JSON document in its header. One file and
one rename make a checkpoint atomic on any file system.

A file may come from anywhere. safetensors holds the sizes that a header names against the file before it makes a
tensor; the document is held against `_FIELDS` here, so whoever reads it need not ask whether something is there.
"""

import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from distmaml.errors import CheckpointError, DamagedError, first_line
from distmaml.files import atomic_file, disk_errors

FORMAT = 1


def save(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Writes tensors and a JSON document.

    Raises:
      RunError: a full disk, a folder that cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"distmaml": json.dumps({"format": FORMAT, **document})}
    data = safetensors.torch.save(whole, header)
    with disk_errors(path), atomic_file(path) as file:
        file.write(data)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the document that `save` wrote.

    Raises:
      DamagedError: a truncated or foreign file, or one whose document lacks what a run writes.
      CheckpointError: one that is missing, cannot be read, or has another format.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("distmaml", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}. Check the name.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}). Check its permissions and the disk.") from error
    # TypeError and RuntimeError: torch, of a tensor without numbers whose shape it cannot count.
    except (safetensors.SafetensorError, ValueError, TypeError, RuntimeError) as error:
        reason = first_line(error)[:200]
        raise DamagedError(f"{path} is damaged or not a safetensors file ({reason}). Take another one.") from error
    if not isinstance(document, dict) or "format" not in document:
        raise DamagedError(f"{path} was not written by distmaml: its header has no distmaml document.")
    if document["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {_shown(document['format'])}; this version of distmaml reads format {FORMAT}."
        )
    _check(path, document, _FIELDS)
    return tensors, document


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint after `step` outer steps."""
    return folder / f"{step:08d}.safetensors"


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdecimal())


def newest(folder: Path) -> int | None:
    """The step of the newest whole checkpoint, or None. Damaged ones stay until the run gets there again.

    A model in the place of a checkpoint counts as damaged: a run cannot go on from it.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged, or one cannot be read.
    """
    found = steps(folder)
    for step in reversed(found):
        try:
            _, document = load(path_of(folder, step))
            _check(path_of(folder, step), document, _STATE)
        except DamagedError:
            continue
        return step
    if found:
        raise CheckpointError(f"all checkpoints in {folder} are damaged; start again under another name.")
    return None


# -------------------------------------------------------------------------------------------- documents


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_shapes(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("input_shape"), list):
        return False
    sizes = [*value["input_shape"], value.get("num_outputs")]
    sizes += [value["num_classes"]] if value.get("num_classes") is not None else []
    return all(_is_count(size) and size > 0 for size in sizes)


def _is_dataset(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    return type(value.get("ink")) is bool and all(type(value.get(key)) is str for key in ("content_hash", "split_hash"))


_Fields = dict[str, tuple[str, Callable[[Any], bool]]]

_FIELDS: _Fields = {
    "step": ("a whole number", _is_count),
    "config": ("a table of names and values", lambda value: isinstance(value, dict)),
    "shapes": ("input_shape, a list of sizes, and num_outputs, a size", _is_shapes),
    "dataset": ("the content_hash, the split_hash and the ink of a store, or none", _is_dataset),
}
"""What the document of each file says, of a checkpoint and of a model."""

_STATE: _Fields = {
    "best": ("a number or none", lambda value: value is None or type(value) in (int, float)),
    "stale": ("a whole number", _is_count),
}
"""What that of a checkpoint says besides."""


def _check(path: Path, document: Mapping[str, Any], fields: _Fields) -> None:
    for name, (described, holds) in fields.items():
        if name not in document or not holds(document[name]):
            found = _shown(document[name]) if name in document else "missing"
            raise DamagedError(
                f"{path} is damaged or of another kind: {name!r} in its header is {found}, but must be {described}. "
                "Take another one."
            )


def _shown(value: Any) -> str:
    return reprlib.repr(value)[:60]
