from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from detection.data import rle

reference = pytest.importorskip("pycocotools.mask")


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    smooth = [
        np.add.outer(np.sin(np.arange(h) / 7), np.cos(np.arange(w) / 5)) > t
        for h, w, t in ((50, 70, 0.3), (1, 9, 0.2), (9, 1, -0.2), (640, 480, 1.0))
    ]
    return [
        *smooth,
        np.zeros((5, 7), bool),
        np.ones((5, 7), bool),
        *(rng.random((23, 17)) < p for p in (0.01, 0.5, 0.99)),
    ]


@pytest.mark.parametrize("mask", masks(), ids=lambda m: f"{m.shape}-{m.sum()}")
def test_codec_equals_pycocotools(mask: np.ndarray) -> None:
    expected = reference.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert rle.encode(mask) == expected
    np.testing.assert_array_equal(rle.decode(expected), mask)
    counts = rle.check(expected, mask.shape)
    assert rle.compress(counts) == expected["counts"]
    x, y, w, h = reference.toBbox(expected)
    assert rle.box(counts, mask.shape[0]) == ((x, y, x + w, y + h) if mask.any() else (0, 0, 0, 0))


def blob(i: int) -> dict[str, Any]:
    window = np.ones((4 + i % 23, 4 + i % 29), bool)
    return rle.encode_window(window, (i % 31, i % 17), (64, 64))


def held(make: Callable[[], Any]) -> int:
    """Bytes that what is made holds."""
    tracemalloc.start()
    made = make()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del made
    return held


def test_packed_masks_are_what_they_were_in_less_memory() -> None:
    """In each form of counts; sent to another process too."""
    rng = np.random.default_rng(0)
    apart = [rle.encode(rng.random((23, 17)) < p) for p in (0.0, 0.1, 0.9, 1.0)]
    given = [apart[0] | {"counts": rle.check(apart[0], (23, 17))}, *apart[1:3]]
    given += [apart[3] | {"counts": apart[3]["counts"].decode()}]
    packed = rle.Packed(given, (23, 17))
    again = pickle.loads(pickle.dumps(packed))
    for masks in (packed, again):
        assert list(masks) == apart and masks[-1] == apart[3] and masks[1:3] == apart[1:3] and len(masks) == 4
        assert masks.size == (23, 17)
        with pytest.raises(IndexError):
            masks[4]
    assert not rle.Packed([], (5, 4)) and list(rle.Packed([], (5, 4))) == []
    assert held(lambda: rle.Packed(map(blob, range(1000)), (64, 64))) < 0.5 * held(lambda: [*map(blob, range(1000))])
    with pytest.raises(ValueError, match="mask 1 has 5 rows of 4 pixels, but its image 23 of 17"):
        rle.Packed([apart[0], rle.encode(np.ones((5, 4)))], (23, 17))


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ({"size": [4, 5], "counts": [20]}, "not the image's"),
        ({"size": [5, 4], "counts": [19]}, "do not add up"),
        ({"size": [5, 4], "counts": [-1, 21]}, "do not add up"),
        ({"size": [5, 4], "counts": [20.0]}, "neither"),
        ({"size": [5, 4]}, "neither"),
        ({"size": [5, 4], "counts": "P"}, "cut off"),
        ({"size": [5, 4], "counts": "\x01"}, "damaged"),
        ({"size": [5, 4], "counts": "ooooooooooooooooooooo"}, "damaged"),
        ({"counts": "d0"}, "not the image's"),
    ],
)
def test_damage_is_named(damaged: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rle.check(damaged, (5, 4))
