"""Reads the arrays of a pickle, such as Detectron2's model zoo consists of, without running anything that it names.

A pickle is a program: it names functions, calls them, and sets attributes. Here every name but the few below is
refused when it is read, before anything can be called with it. Those few stand for objects of this module, which
can't be changed, and which look at what they are given; not even numpy's own unpickling is run.
"""

from __future__ import annotations

import codecs
import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from detection.weights import CheckpointError, check_sums, readable

LARGEST = 1 << 40  # bytes that one array may have: what can't be is refused before it is multiplied out


def read_pickle(path: Path) -> Any:
    """The containers, numbers, texts and arrays of a pickle that Python 2 or 3 wrote.

    Raises:
        CheckpointError: it names anything else, or is damaged. Nothing of it was run.
    """
    with open(path, "rb") as file:
        try:
            return _finish(_ArraysOnly(file).load(), {})
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; nothing of it was run") from error
        except Exception as error:  # a damaged or hostile stream may raise anything
            raise CheckpointError(f"{path}: not a pickle of arrays ({type(error).__name__}: {error})") from error


def read_without_objects(path: Path) -> Any:
    """What `torch.save` has written, without the objects of MMEngine and NumPy in it: nothing stands in their place.

    Checkpoints of a run of MMDetection hold its log, `message_hub`, beside tensors, classes and configuration.

    Raises:
        CheckpointError: damaged, or with anything else in it than these, tensors and plain values. Nothing of it was
            run.
    """
    with readable(path):
        check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_WITHOUT_OBJECTS)


class _Dropped:
    """In the place of a class or function of the file's, or of what it would have made: takes all and does nothing."""

    def __new__(cls, *_args: Any, **_named: Any) -> _Dropped:
        return object.__new__(cls)

    def __call__(self, *_args: Any, **_named: Any) -> _Dropped:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, item: Any) -> None:
        """Takes what a pickle fills a list with."""

    def extend(self, items: Any) -> None:
        """Likewise."""


TENSORS = {("collections", "OrderedDict"), ("torch", "Size"), ("torch._utils", "_rebuild_tensor_v2"),
           ("torch._utils", "_rebuild_parameter")}  # fmt: skip


# What NumPy's arrays and MMEngine's buffers name besides themselves. Here these, too, make nothing of nothing.
OF_OBJECTS = {("_codecs", "encode"), ("__builtin__", "getattr"), ("builtins", "getattr")}


class _WithoutObjects(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in TENSORS:
            return super().find_class(module, name)
        if module.partition(".")[0] in ("mmengine", "mmcv", "numpy") or (module, name) in OF_OBJECTS:
            return _Dropped
        _refuse(f"it names {module}.{name}, which a file of tensors has no use for")


_WITHOUT_OBJECTS = SimpleNamespace(
    __name__="pickles", Unpickler=_WithoutObjects, load=lambda file, **options: _WithoutObjects(file, **options).load()
)


class _Dtype:
    """A number type, as `numpy.dtype` pickles itself: a kind and a size, then the byte order."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __setstate__(self, state: Any) -> None:
        order, *rest = _tuple(state)[1:]
        if order not in ("<", ">", "|", "=") or any(part not in (None, -1, 0) for part in rest):
            _refuse("it has arrays of records")
        self.text = (order if order in "<>" else "") + self.text.lstrip("<>")

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.text)


class _Array:
    """An array before its content has come: numpy makes an empty one and sets its state."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = _tuple(state)
        self.value = _build(raw, dtype, shape, "F" if fortran else "C")


class _Stand:
    """What a name in the pickle is taken for. It has no attributes to set; those below can be called."""

    __slots__ = ()


class _MakeDtype(_Stand):
    __slots__ = ()

    def __call__(self, text: Any, *_flags: Any) -> _Dtype:
        text = text.decode("latin1") if isinstance(text, bytes) else text
        if not isinstance(text, str) or not re.fullmatch(r"[<>|]?(f[248]|[iu][1248]|b1)", text):
            _refuse(f"it has arrays of {str(text)[:40]!r}, which are not numbers")
        return _Dtype(text.lstrip("|"))


class _MakeArray(_Stand):
    """`numpy.core.multiarray._reconstruct(ndarray, (0,), b"b")`: an array to be filled by its state."""

    __slots__ = ()

    def __call__(self, kind: Any, shape: Any, _dtype: Any) -> _Array:
        if not isinstance(kind, _Ndarray) or shape != (0,):
            _refuse("it makes an array in no way that numpy does")
        return _Array()


class _MakeScalar(_Stand):
    """`numpy.core.multiarray.scalar(dtype, bytes)`."""

    __slots__ = ()

    def __call__(self, dtype: Any, raw: Any) -> Any:
        return _build(raw, dtype, (), "C")[()]


class _FromBuffer(_Stand):
    """`numpy.core.numeric._frombuffer(buffer, dtype, shape, order)`, of pickle's protocol 5."""

    __slots__ = ()

    def __call__(self, raw: Any, dtype: Any, shape: Any, order: Any) -> Any:
        return _build(raw, dtype, shape, order)


class _Encode(_Stand):
    """`_codecs.encode(text, "latin1")`: how Python 3 writes bytes for Python 2."""

    __slots__ = ()

    def __call__(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            _refuse("it encodes something other than bytes")
        return codecs.latin_1_encode(text)[0]


class _NoBytes(_Stand):
    """`bytes()`: how Python 3 writes no bytes at all for Python 2."""

    __slots__ = ()

    def __call__(self) -> bytes:
        return b""


class _MakeDict(_Stand):
    """`collections.OrderedDict(...)`; dictionaries have been ordered since."""

    __slots__ = ()

    def __call__(self, *items: Any) -> OrderedDict[Any, Any]:
        return OrderedDict(*items)


class _Ndarray(_Stand):
    """`numpy.ndarray`, which a pickle only hands to `_reconstruct`."""

    __slots__ = ()


NAMES: dict[tuple[str, str], _Stand] = {
    ("collections", "OrderedDict"): _MakeDict(),
    ("_codecs", "encode"): _Encode(),
    ("__builtin__", "bytes"): _NoBytes(),
    ("numpy", "dtype"): _MakeDtype(),
    ("numpy", "ndarray"): _Ndarray(),
}
for _package in ("numpy.core", "numpy._core"):
    NAMES[_package + ".multiarray", "_reconstruct"] = _MakeArray()
    NAMES[_package + ".multiarray", "scalar"] = _MakeScalar()
    NAMES[_package + ".numeric", "_frombuffer"] = _FromBuffer()


class _ArraysOnly(pickle.Unpickler):
    def __init__(self, file: BinaryIO) -> None:
        # Python 2's texts held numpy's bytes, which this encoding leaves as they are.
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NAMES:
            _refuse(f"it names {module}.{name}, which a file of arrays has no use for")
        return NAMES[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        _refuse("it refers to objects outside itself")


def _build(raw: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)) or order not in ("C", "F"):
        _refuse("it makes an array in no way that numpy does")
    if any(type(side) is not int or side < 0 for side in _tuple(shape)):
        _refuse("it makes an array of impossible shape")
    kind = dtype.numpy()
    size = math.prod(shape) * kind.itemsize
    if size > LARGEST or size != len(raw):
        _refuse(f"an array of shape {shape} has {len(raw)} bytes in place of {size}")
    return np.frombuffer(bytes(raw), kind).reshape(shape, order=order).astype(kind.newbyteorder("="), copy=True)


def _finish(value: Any, done: dict[int, Any]) -> Any:
    """The content with arrays in place of what stood for them; what is referred to twice is gone through once."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, (_Stand, _Dtype)):
        return str(value)
    if isinstance(value, (dict, list, tuple)) and id(value) not in done:
        items = [_finish(item, done) for item in (dict.values(value) if isinstance(value, dict) else value)]
        done[id(value)] = dict(zip(dict.keys(value), items, strict=True)) if isinstance(value, dict) else items
    return done.get(id(value), value)


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        _refuse("it makes an array in no way that numpy does")
    return value


def _refuse(reason: str) -> NoReturn:
    raise CheckpointError(f"refused: {reason}")
