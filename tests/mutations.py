"""Files that are almost whole, as hypothesis draws them: bytes, JSON documents, safetensors and Arrow files."""

import copy
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from distmaml.store import write_store

Draw = st.DrawFn

NUMBERS = [
    *(0, 1, 2, 3, 7, 8, 9, 127, 128, 255, 256, 65535, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**47, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30, -1, -2, -8, -(2**31), -(2**63), -(10**30)),
]
"""Where counters of some width end, and what lies beyond."""

_TEXTS = ["", "\0", "\n", "/", "..", "\ud800", "\udce9", "é", "x" * 300, "os:getcwd", "float64", "samples", "nan"]
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-3, 40),
    st.floats(),
    st.sampled_from(_TEXTS),
    st.text(),
)
DOCUMENTS = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8
)
"""Any JSON."""

_DEEP = "a very deep list"


def dumped(document: Any) -> bytes:
    """JSON, with the lists that are too deep for the encoder."""
    deep = "[" * 5000 + "]" * 5000
    almost = "[" * 900 + "]" * 900
    text = json.dumps(document).replace(f'"{_DEEP}"', deep).replace(f'"almost {_DEEP}"', almost)
    return text.encode()


# -------------------------------------------------------------------------------------------------- JSON


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    if isinstance(document, dict | list):
        for key in document if isinstance(document, dict) else range(len(document)):
            yield document, key
            yield from _places(document[key])


@st.composite
def edited(draw: Draw, document: Any) -> Any:
    """The document with one to three values replaced, removed, repeated or moved."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(DOCUMENTS)
        container, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "scalar", "remove", "repeat", "move", "add", "deep"]))
        if how == "replace":
            container[key] = draw(DOCUMENTS)
        elif how == "scalar":
            container[key] = draw(_SCALARS)
        elif how == "remove":
            del container[key]
        elif how == "repeat":
            most = 3 if isinstance(container[key], dict | list) else 1000
            container[key] = [container[key]] * draw(st.sampled_from([0, 1, 2, 3, most]))
        elif how == "move":
            other, place = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[place]) if _has(other, place) else None
        elif how == "add" and isinstance(container, dict):
            container[draw(st.text() | st.sampled_from(_TEXTS))] = draw(DOCUMENTS)
        elif how == "deep":
            container[key] = draw(st.sampled_from([_DEEP, f"almost {_DEEP}"]))
    return document


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def json_file(document: Any) -> st.SearchStrategy[bytes]:
    """A JSON document that is edited, its text damaged, or any other."""
    whole = json.dumps(document).encode()
    return st.one_of(edited(document).map(dumped), edited(document).map(dumped), damaged(whole), DOCUMENTS.map(dumped))


@st.composite
def lines(draw: Draw, whole: bytes) -> bytes:
    """A file of JSON lines, of which some are edited, exchanged, repeated or damaged."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(whole))
    documents = [json.loads(line) for line in whole.splitlines()]
    torn: bytes | None = None
    for _ in range(draw(st.integers(1, 3))):
        at, other = (draw(st.integers(0, len(documents) - 1)) for _ in range(2))
        how = draw(st.sampled_from(["edit", "edit", "edit", "tear", "exchange", "repeat"]))
        if how == "edit":
            documents[at] = draw(edited(documents[at]))
        elif how == "tear":
            torn = draw(damaged(dumped(documents[at])))
        elif how == "exchange":
            documents[at], documents[other] = documents[other], documents[at]
        else:
            documents.insert(at, documents[other])
    texts = [dumped(document) for document in documents]
    if torn is not None:
        texts.insert(draw(st.integers(0, len(texts))), torn)
    return b"".join(text + b"\n" for text in texts)


# ------------------------------------------------------------------------------------------------- bytes


@st.composite
def damaged(draw: Draw, whole: bytes) -> bytes:
    """The bytes with one to four of: a bit flipped, a number overwritten, a piece cut off, out, copied or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at, other = (draw(st.integers(0, len(data) - 1)) for _ in range(2))
        length = draw(st.integers(1, 64))
        how = draw(st.sampled_from(["flip", "number", "number", "nudge", "nudge", "cut", "out", "copy", "insert"]))
        if how == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            width = draw(st.sampled_from([1, 2, 4, 8]))
            at -= at % width
            value = draw(st.sampled_from([*NUMBERS, len(whole), len(whole) - at]))
            data[at : at + width] = (value % 256**width).to_bytes(width, "little")
        elif how == "nudge":  # lengths and offsets that are a little wrong
            at -= at % 4
            value = int.from_bytes(data[at : at + 4], "little") + draw(st.integers(-16, 16))
            data[at : at + 4] = (value % 2**32).to_bytes(4, "little")
        elif how == "cut":
            del data[at:]
        elif how == "out":
            del data[at : at + length]
        elif how == "copy":
            data[at : at + length] = data[other : other + length]
        else:
            data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


# ------------------------------------------------------------------------------------------- safetensors

_DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "C64", "F8_E4M3", "F8_E8M0", "F4", "U16", "X"]


@st.composite
def safetensors(draw: Draw, whole: bytes) -> bytes:
    """A safetensors file whose bytes are damaged, or whose header or document says something else."""
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    part = draw(st.sampled_from(["bytes", "document", "document", "tensors", "tensors", "header"]))
    if part == "bytes":
        return draw(damaged(whole))
    if part == "document":
        document = json.loads(header["__metadata__"]["distmaml"])
        header["__metadata__"]["distmaml"] = dumped(draw(edited(document) | DOCUMENTS)).decode()
    elif part == "tensors":
        for _ in range(draw(st.integers(1, 3))):
            _change_tensor(draw, header)
        data = draw(st.sampled_from([data, data, data, data[:-1], data + bytes(8), b""]))
    else:
        header = draw(edited(header))
    encoded = dumped(header)
    if draw(st.integers(0, 9)) == 0 and isinstance(header, dict) and len(header) > 2:
        one, other = list(header)[1:3]
        encoded = encoded.replace(f'"{one}":'.encode(), f'"{other}":'.encode())  # a name that comes twice
    told = len(encoded) if draw(st.integers(0, 9)) else draw(st.sampled_from([*NUMBERS, len(encoded) + 8])) % 2**64
    return told.to_bytes(8, "little") + encoded + data


def _change_tensor(draw: Draw, header: dict[str, Any]) -> None:
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    tensor = header[name]
    how = draw(st.sampled_from(["dtype", "type", "shape", "flat", "empty", "offsets", "same", "rename", "remove"]))
    if how == "dtype":
        tensor["dtype"] = draw(st.sampled_from(_DTYPES))
    elif how == "type":  # of the same width
        tensor["dtype"] = draw(st.sampled_from(["I32", "U32", "F32"]))
    elif how == "shape":
        tensor["shape"] = draw(st.lists(st.sampled_from(NUMBERS), max_size=5))
    elif how == "flat":  # as many numbers in another shape
        count = int(np.prod([size for size in tensor["shape"] if isinstance(size, int)] or [1]))
        tensor["shape"] = draw(st.sampled_from([[count], [1, count], [count, 1], [1] * 70 + [count]]))
    elif how == "empty":  # no numbers in a huge shape, behind all others
        last = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        shape = [*draw(st.lists(st.sampled_from(NUMBERS), max_size=3)), 0]
        header[draw(st.sampled_from(["more", f"optimizer/{name}", name, "optimizer/x"]))] = {
            "dtype": "F32", "shape": shape, "data_offsets": [last, last]
        }  # fmt: skip
    elif how == "offsets":
        tensor["data_offsets"] = draw(st.lists(st.sampled_from(NUMBERS), min_size=2, max_size=2))
    elif how == "same":
        tensor["data_offsets"] = header[other]["data_offsets"]
    elif how == "rename":
        new = draw(st.sampled_from([other, "", "optimizer/", "optimizer/exp_avg", "optimizer/step/x", "meta_params/"]))
        header[draw(st.text()) if draw(st.booleans()) else new] = header.pop(name)
    else:
        del header[name]


# ------------------------------------------------------------------------------------------------- Arrow

_SHAPE = (1, 2, 3)


@functools.cache
def _whole_store() -> bytes:
    images = np.arange(4 * 4 * 6, dtype=np.uint8).reshape(4, 4, *_SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        write_store(
            Path(folder) / "x.arrow",
            name="toy",
            source="numpy",
            licence="none",
            image_shape=_SHAPE,
            ink=True,
            classes=zip("abcd", images, strict=True),
            splits={"default": {"train": ["a", "b"], "val": ["c"], "test": ["d"]}},
        )
        return (Path(folder) / "x.arrow").read_bytes()


@st.composite
def stores(draw: Draw) -> bytes:
    """A store whose bytes are damaged, whose metadata say something else, or an Arrow file of other things."""
    how = draw(st.sampled_from(["bytes", "bytes", "bytes", "metadata", "table"]))
    if how == "bytes":
        return draw(damaged(_whole_store()))
    table = pa.ipc.open_file(_whole_store()).read_all()
    metadata = table.schema.metadata[b"distmaml"]
    if how == "metadata":
        metadata = dumped(draw(edited(json.loads(metadata)) | DOCUMENTS))
    else:
        table = draw(st.sampled_from(_other_tables(table)))
    options = pa.ipc.IpcWriteOptions(compression=draw(st.sampled_from([None, None, None, "lz4", "zstd"])))
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({b"distmaml": metadata})
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=draw(st.sampled_from([None, None, 5])))
    written = sink.getvalue().to_pybytes()
    return written if draw(st.booleans()) else draw(damaged(written))


def _other_tables(table: Any) -> list[Any]:
    column = table["image"].combine_chunks()
    storage = column.storage
    nulls = pa.FixedSizeListArray.from_arrays(storage.values, 6, mask=pa.array([True] + [False] * 15))
    columns = {
        "image": [
            pa.ExtensionArray.from_storage(column.type, nulls),
            storage,
            pa.FixedSizeListArray.from_arrays(storage.values.cast(pa.int16()), 6),
            pa.FixedSizeListArray.from_arrays(storage.values, 3),
            pa.array([[1, 2], [3]] * 8, pa.list_(pa.uint8())),
            pa.array([b"123456"] * 16, pa.binary(6)),
            pa.array(["a", "b"] * 8).dictionary_encode(),
            pa.nulls(16),
            pa.array([{"a": 1}] * 16),
        ],
        "picture": [column],
    }
    tables = [pa.table({name: values}) for name, all_values in columns.items() for values in all_values]
    return [*tables, table.slice(0, 0), table.slice(3, 5), pa.table({"image": column, "more": column}), pa.table({})]
