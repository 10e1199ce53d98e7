"""Whatever the bytes of a weight file: the tensors that safetensors itself finds in them, or one line."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from damage import joined
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from if_jax.checkpoints.tensors import read_tensors

VALID = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16), "c": np.float32(7).reshape(())}


def valid_file():
    rows, content = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in VALID.items():
        dtype = {"float32": "F32", "float16": "F16"}[tensor.dtype.name]
        end = len(content) + tensor.nbytes
        rows[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(content), end]}
        content += tensor.tobytes()
    return rows, content


NUMBERS = st.one_of(st.integers(-2, 50), st.sampled_from([2**31, 2**53, 2**63, 2**64 - 1, 2**64, 10**400]))
LEAVES = st.one_of(NUMBERS, st.none(), st.booleans(), st.floats(), st.text(max_size=5))
VALUES = st.one_of(
    LEAVES,
    st.lists(NUMBERS, max_size=3),
    st.lists(LEAVES, max_size=3),
    st.dictionaries(st.text(max_size=3), LEAVES, max_size=2),
    st.sampled_from(["F16", "F32", "BF16", "F64", "I8", "F8_E4M3", "BOOL"]),
)
KEYS = st.sampled_from(["dtype", "shape", "data_offsets", "surplus"])


@st.composite
def damaged_files(draw):
    rows, content = valid_file()
    text = json.dumps(rows).encode()
    kind = draw(st.sampled_from(["bytes", "splice", "length", "field", "row", "name", "content"]))
    if kind == "bytes":
        return draw(st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(lambda b: joined(b, content))))
    if kind == "splice":
        start, count = draw(st.integers(0, len(text))), draw(st.integers(0, 8))
        new = draw(
            st.one_of(st.binary(max_size=6), st.sampled_from([b'"', b"[[", b"}", b",", b"-1", b"1e3", b"\\ud800"]))
        )
        return joined(text[:start] + new + text[start + count :], content)
    if kind == "length":
        length = draw(st.one_of(st.integers(0, 2 * len(text)), st.integers(0, 2**64 - 1)))
        return length.to_bytes(8, "little") + text + content
    if kind == "content":
        return joined(text, content[: draw(st.integers(0, len(content)))] + draw(st.binary(max_size=3)))
    name = draw(st.sampled_from([*VALID, "__metadata__"]))
    if kind == "field":
        rows[name][draw(KEYS)] = draw(VALUES)
    elif kind == "row":
        rows[draw(st.sampled_from([name, "d"]))] = draw(VALUES)
    else:
        rows[draw(st.text(max_size=4))] = rows.pop(name)
    return joined(rows, content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(content=damaged_files())
def test_any_bytes_are_read_as_safetensors_reads_them_or_refused_in_one_line(scratch, content):
    (scratch / "model.safetensors").write_bytes(content)
    tracemalloc.start()
    try:
        opened = {name: np.asarray(tensor) for name, tensor in read_tensors(scratch, "model")[0].items()}
    except ValueError as error:
        assert "model.safetensors" in str(error) and "\n" not in str(error)
        opened = None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000
    try:
        expected = dict(deserialize(content))
    except SafetensorError:
        assert opened is None
        return
    if opened is None:
        assert {row["dtype"] for row in expected.values()} - {"F32", "F16", "BF16"}
        return
    assert opened.keys() == expected.keys()
    for name, row in expected.items():
        assert opened[name].tobytes() == bytes(row["data"]) and list(opened[name].shape) == row["shape"]
