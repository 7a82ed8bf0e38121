"""Pickles: arrays come through, everything else is refused before it can do anything."""

from __future__ import annotations

import builtins
import codecs
import collections
import io
import os
import pickle
import pickletools
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection.interop.pickles import read_pickle
from detection.weights import CheckpointError

ARRAYS: dict[str, Any] = {
    "float32": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "float16": np.array([1.5, -2], dtype=np.float16),
    "big-endian": np.arange(3, dtype=">f8"),
    "column-major": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "int64": np.array(7),
    "bool": np.array([True, False]),
    "uint8": np.arange(5, dtype=np.uint8),
    "empty": np.zeros((0, 4), np.float32),
    "strided": np.arange(10.0)[::3],
}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_numbers_and_containers_come_through(protocol: int, tmp_path: Path) -> None:
    shared = np.ones(3)
    content = {
        "model": OrderedDict(ARRAYS),
        "scalar": np.float32(2.5),
        "plain": [1, 2.5, "text", None, True, (b"bytes", {"deep": -1})],
        "twice": [shared, shared],
        "__author__": "somebody",
    }
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_pickle(path)
    assert list(read["model"]) == list(ARRAYS)
    for name, value in ARRAYS.items():
        np.testing.assert_array_equal(read["model"][name], value)
        assert read["model"][name].dtype == value.dtype.newbyteorder("=")
    assert read["scalar"] == np.float32(2.5) and read["scalar"].dtype == np.float32
    assert read["plain"] == [1, 2.5, "text", None, True, [b"bytes", {"deep": -1}]]
    np.testing.assert_array_equal(read["twice"][1], shared)
    read["model"]["float32"][0] = 5  # arrays of its own, which can be written to


def test_what_python_2_wrote(tmp_path: Path) -> None:
    """Caffe2's files: texts are bytes, and the bytes of an array are a text."""
    stream = (
        b"\x80\x02}q\x00(U\x01wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08\x00\x00\x80\x3f\x00\x00\x00\xc0tbu."
    )
    (tmp_path / "old.pkl").write_bytes(stream)
    np.testing.assert_array_equal(read_pickle(tmp_path / "old.pkl")["w"], np.array([1, -2], np.float32))


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def touch(mark: Path) -> list[str]:
    return [sys.executable, "-c", f"open({str(mark)!r}, 'w')"]


GADGETS: dict[str, Any] = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "subprocess.run": lambda mark: Call(subprocess.run, touch(mark)),
    "builtins.eval": lambda mark: Call(builtins.eval, f"open({str(mark)!r}, 'w')"),
    "builtins.exec": lambda mark: Call(builtins.exec, f"open({str(mark)!r}, 'w')"),
    "builtins.open": lambda mark: Call(builtins.open, str(mark), "w"),
    "builtins.getattr": lambda mark: Call(builtins.getattr, np.ndarray, "tofile"),
    "numpy.load": lambda mark: Call(np.load, str(mark), None, True),
    "numpy.save": lambda mark: Call(np.save, str(mark), [1]),
    "ndarray.tofile": lambda mark: Call(np.ndarray.tofile, np.zeros(3), str(mark)),
    "numpy.memmap": lambda mark: Call(np.memmap, str(mark), "uint8", "w+", 0, 8),
    "namedtuple": lambda mark: Call(collections.namedtuple, "a", ["b"]),  # compiles source
    "codecs.lookup": lambda mark: Call(codecs.lookup, "latin1"),
    "codecs": lambda mark: Call(codecs.encode, "text", "unicode_escape"),
    "an object array": lambda mark: np.array([Call(os.system, f"touch {mark}")], dtype=object),
    "an object in a scalar": lambda mark: np.array([object()], dtype=object)[0],
    "records": lambda mark: np.zeros(2, dtype=[("a", "f4")]),
    "dates": lambda mark: np.array(["2020-01-01"], dtype="datetime64[D]"),
    "texts": lambda mark: np.array(["a"]),
    "a class": lambda mark: io.BytesIO,
    "an object": lambda mark: Path(str(mark)),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", GADGETS)
def test_a_malicious_pickle_is_refused_with_nothing_executed(name: str, protocol: int, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": np.ones(2), "x": GADGETS[name](mark)}}, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"model\.pkl: (refused: .*nothing of it was run|not a pickle of arrays)"):
        read_pickle(path)
    assert not mark.exists()


def test_the_gadgets_above_do_work_elsewhere(tmp_path: Path) -> None:
    """Or the test before would prove nothing."""
    for name in ("os.system", "builtins.eval", "builtins.open", "ndarray.tofile", "numpy.memmap"):
        pickle.loads(pickle.dumps(GADGETS[name](tmp_path / name)))
        assert (tmp_path / name).exists(), name


def proto(body: bytes) -> bytes:
    stream = b"\x80\x04" + body + b"."
    pickletools.dis(stream, out=io.StringIO())  # well formed: what stops it is not a slip of this test
    return stream


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def by_name(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"  # STACK_GLOBAL, which takes dotted names


SYSTEM = by_name("os", "system") + text("touch {mark}") + b"\x85R"
RECONSTRUCT = by_name("numpy.core.multiarray", "_reconstruct")
NDARRAY = by_name("numpy", "ndarray")
EMPTY = RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R"
FLOAT = by_name("numpy", "dtype") + text("f4") + b"\x89\x88\x87R"
STREAMS: dict[str, bytes] = {
    "GLOBAL": b"cos\nsystem\n" + text("touch {mark}") + b"\x85R",
    "STACK_GLOBAL": SYSTEM,
    "INST": b"(" + text("touch {mark}") + b"ios\nsystem\n",
    "OBJ": b"(" + by_name("os", "system") + text("touch {mark}") + b"o",
    "NEWOBJ": by_name("subprocess", "Popen") + text("touch {mark}") + b"\x85\x81",
    "a dotted name of an admitted module": by_name("collections", "_sys.modules"),
    "a dotted name of an admitted class": by_name("collections", "OrderedDict.__subclasses__") + b")R",
    "a dotted name of an admitted function": by_name("numpy.core.multiarray", "_reconstruct.__globals__"),
    "the way from numpy to os": by_name("numpy", "os.system") + text("touch {mark}") + b"\x85R",
    "numpy's runstring": by_name("numpy.testing._private.utils", "runstring") + text("1") + b"}\x86R",
    "numpy.f2py": by_name("numpy.f2py.crackfortran", "myeval") + text("1") + b"\x85R",
    "ctypes of numpy": by_name("numpy.ctypeslib", "load_library") + text("a") + text("b") + b"\x86R",
    "ndarray called": NDARRAY + b"J\xff\xff\xff\x7f\x85\x85R",
    "ndarray made anew": NDARRAY + b"J\xff\xff\xff\x7f\x85\x85\x81",
    "BUILD on a function": RECONSTRUCT + b"}" + text("__code__") + text("x") + b"sb",
    "BUILD on a function's slots": RECONSTRUCT + b"N}" + text("__call__") + NDARRAY + b"s\x86b",
    "BUILD on a class": NDARRAY + b"N}" + text("__setstate__") + RECONSTRUCT + b"s\x86b",
    "BUILD on a dtype": FLOAT + b"(K\x03" + text("<") + EMPTY + b"}}K\x08K\x01K\x3ftb",
    "BUILD with too few bytes": EMPTY + b"(K\x01K\x64\x85" + FLOAT + b"\x89C\x04abcdtb",
    "BUILD with a negative side": EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + FLOAT + b"\x89C\x00tb",
    "BUILD with a monstrous side": EMPTY
    + b"(K\x01\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x3f\x85"
    + FLOAT
    + b"\x89C\x04abcdtb",
    "BUILD with a text for a dtype": EMPTY + b"(K\x01K\x01\x85" + text("f4") + b"\x89C\x04abcdtb",
    "reconstruct a large array": RECONSTRUCT + NDARRAY + b"J\xff\xff\xff\x7f\x85C\x01b\x87R",
    "reconstruct something else": RECONSTRUCT + FLOAT + b"K\x00\x85C\x01b\x87R",
    "a dtype of objects": by_name("numpy", "dtype") + text("O8") + b"\x89\x88\x87R",
    "a dtype in words": by_name("numpy", "dtype") + text("f4,O") + b"\x89\x88\x87R",
    "PERSID": b"Pname\n",
    "an extension": b"\x82\x01",
    "a call of a text": text("os.system") + text("touch {mark}") + b"\x85R",
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_that_no_pickler_writes_are_refused(name: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pkl"
    body = STREAMS[name].replace(text("touch {mark}"), text(f"touch {mark}"))
    path.write_bytes(proto(body))
    with pytest.raises(CheckpointError, match=r"model\.pkl: "):
        read_pickle(path)
    assert not mark.exists()
    # What was tried has left nothing behind: the next file is read as ever.
    path.write_bytes(pickle.dumps({"w": np.ones(2)}))
    np.testing.assert_array_equal(read_pickle(path)["w"], np.ones(2))


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps({"w": np.ones(9)})[:-20]])
def test_damaged_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.pkl: "):
        read_pickle(tmp_path / "model.pkl")


def test_references_do_not_multiply(tmp_path: Path) -> None:
    """Forty lists, each of the one before, twice: a million million if they were copied."""
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested, nested]
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(nested))
    assert len(read_pickle(tmp_path / "model.pkl")) == 2
