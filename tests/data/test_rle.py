from __future__ import annotations

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
