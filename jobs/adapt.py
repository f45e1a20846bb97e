"""Adapts a trained model to pictures of one's own and labels new ones. Needs no Ray."""

import csv
import io
import sys
from pathlib import Path

import torch
import tyro

from distmaml import cli
from distmaml.adapter import load
from distmaml.datasets.images import SUFFIXES
from distmaml.episodes import Batch
from distmaml.errors import DataError
from distmaml.files import write_text


def main(model: Path, support: Path, query: Path, output: Path = Path("predictions.csv")) -> None:
    """Adapt to the pictures in SUPPORT, one folder a class, and label those in QUERY.

    Args:
      model: model.safetensors, or the folder of a run.
      support: one folder a class with a picture or more; the folders' names are the labels.
      query: folder with the pictures to be labelled, or one picture.
      output: CSV file with the probability of each label for each picture.
    """
    if not support.is_dir():
        raise DataError(f"--support {support} is not a folder.")
    learner = load(model)
    classes = sorted(folder for folder in support.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not 2 <= len(classes) <= learner.num_outputs:
        raise DataError(
            f"{support} has {len(classes)} folders. Give a folder for each class; this model tells 2 to "
            f"{learner.num_outputs} classes apart."
        )
    shots = [pictures(folder) for folder in classes]
    labels = torch.cat([torch.full((len(files),), label) for label, files in enumerate(shots)])
    adapted = learner.adapt(Batch(learner.read_pictures([file for files in shots for file in files]), labels))
    queries = [query] if query.is_file() else pictures(query)
    probabilities = adapted.predict(learner.read_pictures(queries))[:, : len(classes)]
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)  # of the classes that were shown
    names = [folder.name for folder in classes]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["picture", "label", *names])
    for file, row in zip(queries, probabilities.tolist(), strict=True):
        best = max(range(len(names)), key=row.__getitem__)
        writer.writerow([file.name, names[best], *(f"{value:.4f}" for value in row)])
        print(f"{file.name}: {names[best]} ({100 * row[best]:.0f} %)")
    write_text(output, table.getvalue())
    print(f"probabilities of all labels: {output}")


def pictures(folder: Path) -> list[Path]:
    """The pictures in a folder, by name."""
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"there is no picture in {folder}; known are {', '.join(sorted(SUFFIXES))}.")
    return files


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: tyro.cli(main)))
