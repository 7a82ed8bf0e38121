"""Which part of a data set each group of images goes to, so that the parts are alike in their classes.

Groups are given away class by class, the rarest first (iterative stratification, Sechidis et al. 2011, figure 1), with
a promise that the paper does not make: a class is in as many parts as it can be.

Shape shorthand:
    G: groups     P: parts     C: classes, then two columns more: images with an object, and all images
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REPAIRS = 200  # groups that are moved, at most, to bring classes to all parts


def distribute(images: NDArray[np.float64], shares: NDArray[np.float64], trains: int | None) -> NDArray[np.intp]:
    """`(G,)`: the part of each group.

    Always next is the class of which the fewest groups are left that its parts may be chosen for freely. Of it goes
    the largest group, to the part that still wants most of its images; where no more groups are left than parts
    without the class, to one of those.

    Args:
        images: `(G, C)` images of each group with an object of each class, groups in the order of their digests.
        shares: `(P,)` of each part, in sum 1.
        trains: the part for a class of one group, if there is such a part.
    """
    has = images > 0
    wanted = shares[:, None] * images.sum(axis=0)  # (P, C) images that each part still gets
    left = has.sum(axis=0)
    without = np.repeat((left > 1)[None], len(shares), axis=0)  # (P, C): parts that need the class and lack it
    if trains is not None:
        without[trains] = True
    queues = [sorted(np.flatnonzero(column), key=lambda g: images[g, -1]) for column in has.T]
    parts = np.full(len(images), -1)
    while left.any():
        spare = left - without.sum(axis=0)
        c = int(np.lexsort((left, spare, left == 0))[0])
        while parts[g := queues[c].pop()] >= 0:
            pass
        forced = spare[c] <= 0 and without[:, c].any()
        free = np.flatnonzero(without[:, c] | (not forced)).tolist()
        part = max(free, key=lambda p: (wanted[p, c], wanted[p, -1], -p))
        parts[g] = part
        wanted[part] -= images[g]
        left -= has[g]
        without[part] &= ~has[g]
    return _mended(has, parts, len(shares), trains)


def _mended(has: NDArray[np.bool_], parts: NDArray[np.intp], count: int, trains: int | None) -> NDArray[np.intp]:
    """The parts with groups moved until each class is in as many as it can be, or until that is given up.

    A search with a memory (tabu): the classes that fall short take turns, and each moves the group that leaves the
    least short; of several that which has rested longest.
    """
    shown = np.array([has[parts == p].sum(axis=0) for p in range(count)])  # (P, C) groups
    needed = np.minimum(has.sum(axis=0), count)
    weight = np.ones(len(needed), np.intp)
    weight[-2] = 4 * len(needed) ** 2  # a part without any object is the worst, a class that does not train is next

    def short(shown: NDArray[np.intp]) -> NDArray[np.intp]:
        missing = np.zeros(len(needed), np.intp) if trains is None else (shown[trains] == 0) & (needed > 0)
        return weight * (needed - (shown > 0).sum(axis=0)) + len(needed) * count * missing  # (C,)

    parts, rested, turn = parts.copy(), np.zeros(len(parts), int), np.zeros(len(needed), int)
    best, least = parts.copy(), short(shown).sum()
    for step in range(1, REPAIRS):
        if not (lacking := np.flatnonzero(short(shown))).size:
            break
        c = min(lacking.tolist(), key=lambda c: (turn[c], needed[c], c))
        moves = []
        for g in np.flatnonzero(has[:, c]):
            for p in np.flatnonzero(shown[:, c] == 0):
                after = shown.copy()
                after[parts[g]] -= has[g]
                after[p] += has[g]
                moves.append((short(after).sum(), rested[g], g, p))
        _, _, g, p = min(moves)
        shown[parts[g]] -= has[g]
        shown[p] += has[g]
        parts[g], rested[g], turn[c] = p, step, step
        if short(shown).sum() < least:
            best, least = parts.copy(), short(shown).sum()
    return best
