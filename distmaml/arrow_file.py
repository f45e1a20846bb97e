"""The one shape of Arrow file that a store is: written by Arrow, read without it.

The file holds a single record batch with a single column ``image`` of the type
``fixed_shape_tensor<uint8, [channels, height, width]>``, so all images are one contiguous piece of it, which numpy
views by a memory map. Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format; the tables and their
fields are those of File.fbs, Schema.fbs and Message.fbs in https://github.com/apache/arrow/tree/main/format.

Arrow's own reader believes a file. It allocates what the file says that a compressed buffer unfolds to (one of 2 KB,
damaged at random, made it ask for 112 TiB), and a mistake in its native code takes the process down, and with it a
worker group. What a store needs of a file is a few numbers, so they are read here, in Python, and each is held against
the size of the file before it is followed. How many images there are makes no difference: a file of gigabytes is open
in a millisecond, and no page of an image is touched.

Knows nothing of what the metadata say.
"""

import itertools
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distmaml.errors import DataError

T = TypeVar("T")

ImageShape = tuple[int, int, int]
"""(channels, height, width)."""

MOST_METADATA = 1 << 28
"""Bytes. Millions of classes have less; the metadata are read into memory before anything is known of them."""

_KEY = b"distmaml"
_MAGIC = b"ARROW1"
_TAIL = 4 + len(_MAGIC)
_EXTENSION = "arrow.fixed_shape_tensor"
_INT, _FIXED_SIZE_LIST, _RECORD_BATCH = 2, 16, 3


def write(file: BinaryIO, metadata: bytes, image_shape: ImageShape, pixels: npt.NDArray[np.uint8]) -> None:
    """Writes all images.

    Args:
      metadata: what the images are.
      pixels: ``[num_rows * channels * height * width]``, may be memory-mapped.

    Raises:
      DataError: more than MOST_METADATA.
    """
    if len(metadata) > MOST_METADATA:
        raise DataError(f"the metadata have {len(metadata)} bytes; {MOST_METADATA} are allowed. Shorten the names.")
    kind = pa.fixed_shape_tensor(pa.uint8(), image_shape)
    schema = pa.schema([pa.field("image", kind, nullable=False)]).with_metadata({_KEY: metadata})
    values = pa.Array.from_buffers(pa.uint8(), len(pixels), [None, pa.py_buffer(pixels)])
    column = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(values, math.prod(image_shape)))
    # A second batch would cut the images in two; one batch of more than 2 GiB needs 64-bit lengths.
    with pa.ipc.new_file(file, schema, options=pa.ipc.IpcWriteOptions(allow_64bit=True)) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))


class ArrowFile:
    """A file that `write` wrote, or any other.

    Args:
      path: the file; it must not change as long as the images are in use.

    Raises:
      OSError: it cannot be read.
      DataError: it is no Arrow file, or its end is not there.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < 8 + _TAIL:
                raise DataError("it is not an Arrow file.")
            self._whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # which lives as long as a view of it
        if self._read(0, len(_MAGIC)) != _MAGIC:
            raise DataError("it is not an Arrow file.")
        tail = self._read(size - _TAIL, _TAIL)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != _MAGIC or not 0 < length <= size - 8 - _TAIL:
            raise DataError(f"it is truncated (it ends after {size} bytes without a footer).")
        if length > MOST_METADATA + (1 << 16):
            raise DataError(f"its footer has {length} bytes; {MOST_METADATA} bytes of metadata are allowed.")
        self._footer = _Table.root(self._read(size - _TAIL - length, length))
        self._schema = self._footer.table(1)

    def metadata(self) -> bytes:
        """What `write` was told that the images are.

        Raises:
          DataError: nothing was.
        """
        found = _value(self._schema.tables(2), _KEY)
        if found is None:
            raise DataError("it has no distmaml metadata.")
        return found

    def images(self, image_shape: ImageShape) -> npt.NDArray[np.uint8]:
        """The images ``[num_rows, *image_shape]``, a read-only view of the file.

        Raises:
          DataError: it holds something else than one batch of such images, or not as many bytes as it says.
        """
        self._check_type(image_shape)
        num_rows, start = self._place(math.prod(image_shape))
        count = num_rows * math.prod(image_shape)
        return np.frombuffer(self._whole, np.uint8, count, start).reshape(-1, *image_shape)

    def _read(self, start: int, length: int) -> bytes:
        found = self._whole[start : start + length]
        if len(found) != length:
            raise DataError(f"it is truncated: {length} bytes at {start} are not there.")
        return found

    def _check_type(self, image_shape: ImageShape) -> None:
        """That the only column is one of uint8 images of a shape."""
        other = DataError(f"it is not one batch of the uint8 images {image_shape} that its metadata say.")
        column = _only(self._schema.tables(1), other)
        extension = {key: _value(column.tables(6), f"ARROW:extension:{key}".encode()) for key in ("name", "metadata")}
        if column.text(0) != b"image" or column.number(2, "B") != _FIXED_SIZE_LIST:
            raise other
        pixel = _only(column.tables(5), other)
        if column.table(3).number(0, "i") != math.prod(image_shape) or pixel.number(2, "B") != _INT:
            raise other
        if (pixel.table(3).number(0, "i"), pixel.table(3).number(1, "?")) != (8, False):
            raise other
        if extension["name"] != _EXTENSION.encode() or _json(extension["metadata"]) != {"shape": list(image_shape)}:
            raise other

    def _place(self, image_size: int) -> tuple[int, int]:
        """The number of images in the only batch, and the byte of the file that they begin at."""
        several = DataError("it does not hold its images in one batch.")
        offset, length, body_length = _only(self._footer.structs(3, "<qi4xq"), several)
        if not (offset >= 8 and 8 < length <= MOST_METADATA and 0 <= body_length <= len(self._whole) - offset - length):
            raise DataError("it is damaged: its batch lies outside the file.")
        message = _Table.root(self._read(offset, length)[8:])  # behind the mark of a message and its length
        batch = message.table(2)
        if message.number(1, "B") != _RECORD_BATCH or batch.has(3):
            raise DataError("it does not hold its images as they are, without compression.")
        nodes, buffers = (list(itertools.islice(batch.structs(field, "<qq"), 4)) for field in (1, 2))
        if len(nodes) != 2 or len(buffers) != 3:
            raise several
        (num_rows, no_image), (num_pixels, no_pixel) = nodes
        if no_image or no_pixel:
            raise DataError("it holds images that are null.")
        start, num_bytes = buffers[2]
        if not (num_rows > 0 and num_rows * image_size == num_pixels <= num_bytes):
            raise DataError(f"it is damaged: {num_bytes} bytes are no {num_rows} images of {image_size} bytes.")
        if not (start >= 0 and start + num_bytes <= body_length):
            raise DataError("it is damaged: its images lie outside their batch.")
        return num_rows, offset + length + start


def _only(items: Iterator[T], otherwise: DataError) -> T:
    found = list(itertools.islice(items, 2))
    if len(found) != 1:
        raise otherwise
    return found[0]


def _value(pairs: Iterator["_Table"], key: bytes) -> bytes | None:
    """What belongs to a key of a schema's or a field's metadata."""
    some = itertools.islice(pairs, 64)  # a hostile file may name millions
    return next((pair.text(1) for pair in some if pair.text(0) == key), None)


def _json(text: bytes | None) -> Any:
    try:
        return json.loads(text or b"null")
    except (ValueError, RecursionError):
        return None


# ------------------------------------------------------------------------------------------ flatbuffers


class _Table:
    """A table of a flatbuffer (https://flatbuffers.dev/internals/), whose fields have numbers.

    Everything that is read is looked for inside the buffer first, so whatever the buffer says, nothing but a DataError
    can come of it.
    """

    def __init__(self, buffer: bytes, start: int) -> None:
        self._buffer, self._start = buffer, start
        self._layout = start - self._unpack("<i", start)[0]
        self._layout_size = self._unpack("<H", self._layout)[0]

    @classmethod
    def root(cls, buffer: bytes) -> "_Table":
        """The table that a buffer holds.

        Raises:
          DataError: it holds none; as all methods do where the buffer ends before what they ask for.
        """
        if len(buffer) < 4:
            raise DataError("it is damaged: a table is too short.")
        return cls(buffer, int.from_bytes(buffer[:4], "little"))

    def has(self, field: int) -> bool:
        """Whether a field is there."""
        return self._find(field) is not None

    def number(self, field: int, kind: str) -> Any:
        """A number of a `struct` kind; 0 where it is left out."""
        place = self._find(field)
        return 0 if place is None else self._unpack(f"<{kind}", place)[0]

    def table(self, field: int) -> "_Table":
        """The table that a field leads to."""
        place = self._find(field)
        if place is None:
            raise DataError(f"it is damaged: the field {field} of a table is missing.")
        return _Table(self._buffer, self._follow(place))

    def text(self, field: int) -> bytes:
        """A text, or nothing."""
        start, count = self._vector(field)
        return bytes(self._unpack(f"<{count}s", start)[0])

    def tables(self, field: int) -> Iterator["_Table"]:
        """The tables of a vector, one at a time."""
        start, count = self._vector(field)
        return (_Table(self._buffer, self._follow(start + 4 * index)) for index in range(count))

    def structs(self, field: int, kind: str) -> Iterator[tuple[int, ...]]:
        """The structs of a vector, one at a time."""
        start, count = self._vector(field)
        return (self._unpack(kind, start + struct.calcsize(kind) * index) for index in range(count))

    def _vector(self, field: int) -> tuple[int, int]:
        place = self._find(field)
        if place is None:
            return 0, 0
        start = self._follow(place)
        return start + 4, self._unpack("<I", start)[0]

    def _find(self, field: int) -> int | None:
        slot = 4 + 2 * field
        if slot + 2 > self._layout_size:
            return None
        offset = self._unpack("<H", self._layout + slot)[0]
        return self._start + offset if offset else None

    def _follow(self, place: int) -> int:
        return place + int(self._unpack("<I", place)[0])

    def _unpack(self, kind: str, start: int) -> tuple[Any, ...]:
        if not 0 <= start <= len(self._buffer) - struct.calcsize(kind):
            raise DataError(f"it is damaged: an offset in its metadata leads to {start} of {len(self._buffer)} bytes.")
        return struct.unpack_from(kind, self._buffer, start)
