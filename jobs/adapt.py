"""Adapts a trained model to pictures of one's own and labels new ones. Needs no Ray."""

import csv
import io
import sys
from pathlib import Path

import torch
import tyro

from distmaml import cli
from distmaml.adapter import load
from distmaml.datasets.images import folders_in, pictures_in
from distmaml.episodes import Batch
from distmaml.errors import DataError, RunError
from distmaml.files import absolute, write_text


def main(model: Path, support: Path, query: Path, output: Path = Path("predictions.csv")) -> None:
    """Adapt to the pictures in SUPPORT, one folder a class, and label those in QUERY.

    Args:
      model: model.safetensors, or the folder of a run.
      support: one folder a class with a picture or more; the folders' names are the labels.
      query: folder with the pictures to be labelled, or one picture.
      output: CSV file with the probability of each label for each picture.
    """
    output = absolute(output)
    if output.is_dir() or not output.parent.is_dir():
        raise RunError(f"--output {output} cannot be written: it is a folder, or lies in none. Name a file.")
    if not support.is_dir():
        raise DataError(f"--support {support} is not a folder.")
    learner = load(model)
    classes = folders_in(support)
    shots = [pictures_in(folder) for folder in classes]
    pictures = learner.read_pictures([file for files in shots for file in files])
    if not 2 <= len(classes) <= learner.num_outputs:
        raise DataError(
            f"{support} has {len(classes)} folders. Give a folder for each class; this model tells 2 to "
            f"{learner.num_outputs} classes apart."
        )
    labels = torch.cat([torch.full((len(files),), label) for label, files in enumerate(shots)])
    adapted = learner.adapt(Batch(pictures, labels))
    queries = pictures_in(query) if query.is_dir() else [query]
    probabilities = adapted.predict(learner.read_pictures(queries))[:, : len(classes)]
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


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: tyro.cli(main)))
