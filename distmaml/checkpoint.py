"""Tensors and what belongs to them in one file: no pickle, written as a whole or not at all.

A file is safetensors (https://github.com/huggingface/safetensors) with one JSON document in its header. One file and
one rename make a checkpoint atomic on any file system.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from distmaml.errors import CheckpointError, DamagedError
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
      DamagedError: a truncated or foreign file.
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
    except (safetensors.SafetensorError, ValueError) as error:
        raise DamagedError(f"{path} is damaged or not a safetensors file ({error}). Take another one.") from error
    if not isinstance(document, dict) or "format" not in document:
        raise DamagedError(f"{path} was not written by distmaml: its header has no distmaml document.")
    if document["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {document['format']}; this version of distmaml reads format {FORMAT}."
        )
    return tensors, document


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint after `step` outer steps."""
    return folder / f"{step:08d}.safetensors"


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    return sorted(int(path.stem) for path in folder.glob("*.safetensors") if path.stem.isdecimal())


def newest(folder: Path) -> int | None:
    """The step of the newest whole checkpoint, or None. Damaged ones stay until the run gets there again.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged, or one cannot be read.
    """
    found = steps(folder)
    for step in reversed(found):
        try:
            load(path_of(folder, step))
        except DamagedError:
            continue
        return step
    if found:
        raise CheckpointError(f"all checkpoints in {folder} are damaged; start again under another name.")
    return None
