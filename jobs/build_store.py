"""Builds a data set's store:  python jobs/build_store.py omniglot --data-dir DIR"""

import sys
from pathlib import Path

import tyro

from distmaml import build, cli, paths
from distmaml.config import is_custom
from distmaml.datasets import ensure_store
from distmaml.splits import SAMPLES, SPLITS
from distmaml.store import open_store


def main(
    dataset: tyro.conf.Positional[str],
    data_dir: Path | None = None,
    output_dir: Path | None = None,
    image_size: int = 28,
    color: bool = False,
) -> None:
    """Build the store of a data set, also if there is one, and print what is in it.

    Args:
      dataset: glyphs, omniglot, image_folder, or package.module:attribute.
      data_dir: folder with the raw files. Not needed for glyphs; Omniglot is downloaded without it.
      output_dir: the store goes to OUTPUT_DIR/stores. Default: $DISTMAML_HOME, else ~/distmaml.
      image_size: height and width of the images in pixels.
      color: read the pictures as RGB rather than grey.
    """
    path = ensure_store(
        dataset,
        data_dir=data_dir,
        image_size=image_size,
        color=color,
        stores_dir=paths.stores(paths.output_dir(output_dir)),
        builder=build.import_attribute(dataset) if is_custom(dataset) else None,
        rebuild=True,
    )
    store = open_store(path)
    print(path)
    print(f"{len(store.info.class_names)} classes, {len(store.images)} images of {store.info.image_shape}")
    print(f"content {store.info.content_hash}")
    for scheme, parts in store.info.splits.items():
        sizes = ", ".join(f"{len(parts[split])} {split}" for split in SPLITS)
        print(f"split {scheme}: {sizes} classes, {store.split_hash(scheme)}")
    if not store.info.splits:
        print(f"split {SAMPLES}: too few classes to divide; use --split-by samples")


if __name__ == "__main__":
    sys.exit(cli.guarded(lambda: tyro.cli(main)))
