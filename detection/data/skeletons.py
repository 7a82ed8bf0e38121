"""What is known of the key points of a data set: their names, which are left and right, what joins them, how far they
scatter.

Shape shorthand:
    N: objects     k: key points of an object
Coordinates are those of the file, taken as they are: a box from 10 to 20 and a point at 10 begin in the same place.
That is torchvision's reading of COCO. Detectron2 adds half a pixel to each point, as an annotator points at pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HEAD = ("nose", "left_eye", "right_eye", "left_ear", "right_ear")
LIMBS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
COCO_NAMES = (*HEAD, *(f"{side}_{limb}" for limb in LIMBS for side in ("left", "right")))
# Of COCO's evaluation code: the standard deviation of annotators is twice that, in shares of the object's size.
COCO_SIGMAS = (0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087,
               0.089, 0.089)  # fmt: skip
COCO_EDGES = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9),
              (8, 10), (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))  # fmt: skip
SIGMA = 0.05  # of other points, where nothing is said
SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}

Pair = tuple[int | str, int | str]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """The k key points of each object of a data set.

    Attributes:
        names: of the points; where the file gives none, their numbers from 0 on.
        pairs: positions of left and right partners, each pair once; None where they are not known.
        edges: positions of points that a picture joins by a line.
        sigmas: how far annotators scatter, for OKS; empty for the default, see `oks_sigmas`.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...] | None = None
    edges: tuple[tuple[int, int], ...] = ()
    sigmas: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def flip(self) -> NDArray[np.int64] | None:
        """`(k,)`: in a mirror, point i is what point `flip[i]` was; None where the pairs are not known."""
        if self.pairs is None:
            return None
        order = np.arange(len(self.names))
        for a, b in self.pairs:
            order[[a, b]] = b, a
        return order

    @property
    def oks_sigmas(self) -> tuple[float, ...]:
        """`(k,)`: as given, else COCO's for its 17 points, else .05 for each."""
        is_coco = self.names in (COCO_NAMES, numbered(len(COCO_NAMES)))
        return self.sigmas or (COCO_SIGMAS if is_coco else (SIGMA,) * len(self))

    @property
    def guesses_sigmas(self) -> bool:
        """Whether `oks_sigmas` are neither given nor COCO's."""
        return not self.sigmas and self.oks_sigmas != COCO_SIGMAS

    def with_settings(self, pairs: Sequence[Pair] | None, sigmas: Sequence[float] | None) -> Skeleton:
        """The same with what the user knows better.

        Args:
            pairs: by names or positions from 0 on; None leaves what the data says.
            sigmas: one a point; None likewise.

        Raises:
            ValueError: a pair names no points, or a point twice; there are not k sigmas above 0.
        """
        if sigmas is not None and (len(sigmas) != len(self) or not all(0 < value < np.inf for value in sigmas)):
            raise ValueError(
                f"data.keypoint_sigmas are {len(sigmas)} numbers: give one above 0 for each of {len(self)} key points"
            )
        known = self.pairs if pairs is None else tuple((self._place(a), self._place(b)) for a, b in pairs)
        used = [place for pair in known or () for place in pair]
        if len(set(used)) < len(used):
            twice = next(self.names[place] for place in used if used.count(place) > 1)
            raise ValueError(f"data.keypoint_pairs: the point '{twice}' is there twice; give it one partner, or none")
        return Skeleton(self.names, known, self.edges, tuple(sigmas or self.sigmas))

    def _place(self, point: int | str) -> int:
        if isinstance(point, str) and point in self.names:
            return self.names.index(point)
        if isinstance(point, int) and 0 <= point < len(self):
            return point
        raise ValueError(
            f"data.keypoint_pairs: there is no point {point!r}; there are 0 to {len(self) - 1}: {', '.join(self.names)}"
        )


def edges_of(count: int) -> tuple[tuple[int, int], ...]:
    """What joins so many key points where nothing is said: COCO's lines for 17, else none."""
    return COCO_EDGES if count == len(COCO_NAMES) else ()


def numbered(count: int) -> tuple[str, ...]:
    """Names of points that have none."""
    return tuple(map(str, range(count)))


def pairs_by_name(names: Sequence[str]) -> tuple[tuple[int, int], ...] | None:
    """Left and right partners as names show them: `left_eye` and `right_eye`, `eye_l` and `eye_r`, `LeftEye`.

    None where a name has a side but no partner: what a mirror makes of it is not known. No pair, `()`, where no name
    has a side: then each point stays what it is.
    """
    words = [_words(name) for name in names]
    # A single letter may also mean something else (`r` of a reel), so that it counts with its partner alone.
    pairs, left_over = list[tuple[int, int]](), False
    for i, own in enumerate(words):
        mirrored = tuple(SIDES.get(word, word) for word in own)
        if mirrored == own:
            continue
        if words.count(mirrored) == 1 and words.count(own) == 1:
            j = words.index(mirrored)
            pairs += [(i, j)] if i < j else []
        else:
            left_over |= bool({"left", "right"} & set(own))
    return None if left_over else tuple(pairs)


def _words(name: str) -> tuple[str, ...]:
    """`LeftEye`, `left_eye` and `left eye` are the same words."""
    return tuple(word.casefold() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+", name))


def inside(points: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Points `(..., 3)`; those that are not annotated, or lie outside of the picture, become zeros."""
    x, y, seen = points[..., 0], points[..., 1], points[..., 2]
    kept = (seen > 0) & (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    return np.where(kept[..., None], points, np.float32(0)).astype(np.float32)
