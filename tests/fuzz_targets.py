"""What `tests.fuzz` reads: for each reader the files that it gets, and what is done with one that it reads."""

import contextlib
import functools
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from PIL import Image

from distmaml import adapter, build, checkpoint, outer
from distmaml.config import Config, override, read, to_json
from distmaml.datasets import omniglot
from distmaml.datasets.images import read_image
from distmaml.episodes import Batch
from distmaml.errors import DistmamlError
from distmaml.journal import Journal, Move
from distmaml.limits import check
from distmaml.segments import Point, Segment, committed_segments, read_points
from distmaml.splits import SAMPLES, SPLITS
from distmaml.store import open_store
from distmaml.tasks.images import ImageTasks
from distmaml.trees import named_leaves, tree_map
from tests import mutations


class Target(NamedTuple):
    """A reader, and files for it."""

    inputs: Callable[[], st.SearchStrategy[bytes]]
    """What a file may hold."""
    use: Callable[[Path], object]
    """Reads a file and uses what it says."""


# ----------------------------------------------------------------------------------------------- readers


def _use_store(path: Path) -> None:
    store = open_store(path)
    for scheme in (*store.info.splits, SAMPLES):
        with contextlib.suppress(DistmamlError):
            store.split_hash(scheme)
            for split in SPLITS:
                classes = store.classes(scheme, split)
                options: dict[str, Any] = {"num_ways": 2, "num_shots": 1, "num_queries": 1, "rotations": False}
                ImageTasks(store.images, classes, split=split, seed=0, **options).sample([0])
    store.verify()


@functools.cache
def _learner() -> build.Learner:
    return build.learner(_WAVES, _WAVE_SHAPES, torch.device("cpu"))


def _use_checkpoint(path: Path) -> None:
    newest = checkpoint.newest(path.parent)
    assert newest is not None
    tensors, document = checkpoint.load(checkpoint.path_of(path.parent, newest))
    state = outer.init_outer(_learner().meta_params, _WAVES.outer)
    outer.load_named_state(state, tensors)
    outer.outer_step(state, tree_map(torch.zeros_like, state.meta_params), document["step"], _WAVES.outer)


def _use_model(path: Path) -> None:
    model = adapter.load(path)
    inputs = torch.rand(3, 1, 8, 8) if model.config.tasks == "images" else torch.rand(3, 1)
    targets = torch.arange(3) if model.config.objective == "classification" else torch.rand(3, 1)
    model.adapt(Batch(inputs, targets), num_steps=1).predict(inputs)


def _use_config(path: Path) -> None:
    config = read(path)
    check(config)
    json.dumps(to_json(config))


def _use_journal(path: Path) -> None:
    journal = Journal(path)
    for trial in journal.trials.values():
        trial.best_values("max")
    journal.started(7, {})
    assert 7 in Journal(path).trials, "what was written after it cannot be read"


def _use_segments(path: Path) -> None:
    committed, _, points = path.read_bytes().partition(b"\n")
    segment = Segment(0, 10, path.with_name("00000000-00000010.jsonl"))
    segment.path.write_bytes(points)
    for point in read_points(segment):
        assert all(isinstance(value, float) for value in point.values.values())
    path.with_name("committed").write_bytes(committed)
    committed_segments(path.parent, after=-1)


def _use_zip(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for name, content in omniglot._zip_files(path, omniglot.PARTS[0], stack).items():
            read_image(io.BytesIO(content()), image_size=8, color=False, ink=True, name=name)


def _use_picture(path: Path) -> None:
    read_image(path, image_size=8, color=True, ink=False)


# ------------------------------------------------------------------------------------------- whole files

_WAVES = override(Config(), {"model": "mlp", "tasks": "sinusoid", "hidden_sizes": (3,), "objective": "regression"})
_WAVE_SHAPES = build.Shapes((1,), 1)
_PICTURES = override(Config(), {"num_filters": 2, "num_ways": 3})
_PICTURE_SHAPES = build.Shapes((1, 8, 8), 3)
_DATASET = {"name": "toy", "source": "x", "content_hash": "0" * 64, "ink": True, "split": "default", "split_hash": "1"}


def _document(config: Config, shapes: build.Shapes, **more: Any) -> dict[str, Any]:
    dataset = _DATASET if config.tasks == "images" else None
    return {"step": 3, "config": to_json(config), "shapes": shapes._asdict(), "dataset": dataset, **more}


def _saved(tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "x.safetensors", tensors, document)
        return (Path(folder) / "x.safetensors").read_bytes()


@functools.cache
def _whole_checkpoint() -> bytes:
    state = outer.init_outer(_learner().meta_params, _WAVES.outer)
    outer.outer_step(state, tree_map(torch.ones_like, state.meta_params), 0, _WAVES.outer)
    return _saved(outer.named_state(state), _document(_WAVES, _WAVE_SHAPES, best=0.5, stale=2))


@functools.cache
def _whole_model(config: Config, shapes: build.Shapes) -> bytes:
    params = named_leaves(build.learner(config, shapes, torch.device("cpu")).meta_params)
    return _saved(params, _document(config, shapes, selection_metric="val/query_loss", value=0.5))


@functools.cache
def _whole_journal() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.jsonl")
        for number in range(3):
            journal.started(number, {"inner_lr": 0.1 * number, "hidden_sizes": [4, 4]})
            journal.reported(number, 10, float("nan") if number == 1 else 0.5)
        journal.moved(10, [Move(0, 2, {"inner_lr": 0.3})])
        journal.over(1, "failed", "a loss is no longer finite")
        return (Path(folder) / "journal.jsonl").read_bytes()


def _models() -> st.SearchStrategy[bytes]:
    whole = [_whole_model(_WAVES, _WAVE_SHAPES), _whole_model(_PICTURES, _PICTURE_SHAPES)]
    return st.one_of([mutations.safetensors(content) for content in whole])


def _configs() -> st.SearchStrategy[bytes]:
    return st.one_of([mutations.json_file(to_json(config)) for config in (_WAVES, _PICTURES)])


def _segments() -> st.SearchStrategy[bytes]:
    points = [Point(step, 1_700_000_000_000, {"train/query_loss": 0.5})._asdict() for step in range(1, 4)]
    return mutations.lines(b"10\n" + b"".join(json.dumps(point).encode() + b"\n" for point in points))


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((12, 9)).convert("RGB").save(file, kind)
    return file.getvalue()


def _pictures() -> st.SearchStrategy[bytes]:
    return st.one_of([mutations.damaged(_picture(kind)) for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")])


def _zips() -> st.SearchStrategy[bytes]:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            member = zipfile.ZipInfo(f"images_background/Greek/character01/{number:04d}_01.png")  # of a fixed date
            archive.writestr(member, _picture("PNG"))
    return mutations.damaged(file.getvalue())


TARGETS = {
    "store": Target(mutations.stores, _use_store),
    "checkpoint": Target(lambda: mutations.safetensors(_whole_checkpoint()), _use_checkpoint),
    "model": Target(_models, _use_model),
    "config": Target(_configs, _use_config),
    "journal": Target(lambda: mutations.lines(_whole_journal()), _use_journal),
    "segments": Target(_segments, _use_segments),
    "zip": Target(_zips, _use_zip),
    "picture": Target(_pictures, _use_picture),
}
"""By name; another one is named as package.module:attribute."""
