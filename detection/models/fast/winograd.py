"""3x3 convolutions on a CPU with a quarter of the multiplications.

Minimal filtering (Winograd 1980; Lavin and Gray 2016, arXiv:1509.09308, section 4.1): a polynomial of degree 5 is known
from its values at six points, so six products, rather than twelve, give four neighbouring outputs of a filter of three;
in two dimensions 36, rather than 144, give 4 x 4. What it costs is rounding: in float32 the error is a millionth of the
outputs' spread, some three times that of the usual kernel. With the paper's points (0, 1, -1, 2, -2) it is twice that.

Between the transforms lie 36 products of matrices, one for each point, which take nearly all of the time. All works on
a few hundred tiles at a time, which stay in the cache.

Shape shorthand:
    B: images     C, C': channels of input and output     h, w: cells of a map     t, u: rows and columns of tiles
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

POINTS = np.array([0, 3 / 4, -3 / 4, 3 / 2, -3 / 2])  # and infinity
SIDE, PATCH = 4, 6  # cells of a tile, and of the patch that its outputs are read from
AT_A_TIME = 100  # tiles, for each thread: 3.7 MB of 256 channels
FEWEST_CHANNELS = 96  # with fewer the usual kernel is quicker
FEWEST_TILES = 64  # likewise
FEWEST_TILES_SPREAD = 24  # for a weight that is spread once for all calls


class WinogradConv2d(nn.Conv2d):
    """`nn.Conv2d` in float32 on a CPU, by minimal filtering where that is quicker."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            return super()._conv_forward(x, weight, bias)
        return conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    """`F.conv2d`, by minimal filtering where that is quicker.

    Args:
        x: `(B, C, h, w)`.
        weight: `(C', C, n, n)`.
        bias: `(C',)`.
        *geometry: stride, padding, dilation and groups.
    """
    if is_filtered(x, weight.shape, *geometry) and weight.dtype == torch.float32:
        y: Tensor = _Filtering.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return y
    return F.conv2d(x, weight, bias, *geometry)


def is_filtered(
    x: Tensor, shape: torch.Size, stride: Any, padding: Any, dilation: Any, groups: int, is_spread: bool = False
) -> bool:
    """Whether minimal filtering is the quicker way for an input and a weight of this shape, which may be spread.

    Args:
        x: `(B, C, h, w)`.
        shape: of the weight, `(C', C, n, n)`.
        stride, padding, dilation, groups: of the convolution.
        is_spread: whether `spread` has been called for it already.
    """
    if torch.compiler.is_compiling():  # a compiler takes the usual kernel, and can't follow tensors made in `out`
        return False
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if shape[2:] != (3, 3) or groups != 1 or min(shape[:2]) < FEWEST_CHANNELS:
        return False
    if any(value not in (1, (1, 1)) for value in (stride, padding, dilation)):
        return False
    tiles = len(x) * -(-x.shape[-2] // SIDE) * -(-x.shape[-1] // SIDE)
    return tiles >= (FEWEST_TILES_SPREAD if is_spread else FEWEST_TILES)


def spread(weight: Tensor) -> Tensor:
    """A weight `(C', C, 3, 3)` at the points, `(36, C, C')`."""
    out, channels = weight.shape[:2]
    cells = weight.permute(2, 3, 1, 0).contiguous().flatten(2)
    return _Scratch().transform(_transforms()[1], cells).view(-1, channels, out)


def filtered(x: Tensor, at_points: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution `(B, C', h, w)` of a map `(B, C, h, w)` with a weight that is `spread` already."""
    read, _, write = _transforms()
    images, height, width = len(x), *(-(-side // SIDE) for side in x.shape[2:])
    shift = x.new_zeros(()) if bias is None else bias
    shape = (images, at_points.shape[2], height * SIDE, width * SIDE)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    out = y.permute(0, 2, 3, 1).view(images, height, SIDE, width, SIDE, -1)
    scratch = _Scratch()
    for part, patches in _tiles(x, 1):
        products = scratch.multiply(scratch.transform(read, scratch.cells(patches)), at_points)
        tiles = scratch.transform(write, products).view(SIDE, SIDE, *patches.shape[:3], -1)
        torch.add(tiles.permute(2, 3, 0, 4, 1, 5), shift, out=out[part])
    if y.shape[2:] == x.shape[2:]:
        return y
    # No view: what lies behind may work in place.
    return y[..., : x.shape[2], : x.shape[3]].clone(memory_format=torch.channels_last)


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient `(C', C, 3, 3)` of the weight from the input and the gradient `(B, C', h, w)` of the output."""
    read, spread_, write = _transforms()
    total = x.new_zeros(PATCH * PATCH, x.shape[1], grad.shape[1])
    left, right = _Scratch(), _Scratch()
    for (_, patches), (_, tiles) in zip(_tiles(x, 1), _tiles(grad, 0), strict=True):
        values = left.transform(read, left.cells(patches)).view(len(total), -1, x.shape[1])
        errors = right.transform(write.t(), right.cells(tiles)).view(len(total), -1, grad.shape[1])
        total.baddbmm_(values.transpose(1, 2), errors)
    weight = _Scratch().transform(spread_.t(), total.view(PATCH, PATCH, -1))
    return weight.view(3, 3, x.shape[1], grad.shape[1]).permute(3, 2, 0, 1)


class _Filtering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return filtered(x, spread(weight), bias)

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call, untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        back = filtered(grad, spread(weight.flip(2, 3).transpose(0, 1))) if for_x else None
        return back, weight_gradient(x, grad) if for_weight else None, grad.sum((0, 2, 3)) if for_bias else None


def _tiles(x: Tensor, frame: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """A few hundred tiles at a time of a map `(B, C, h, w)`, with zeros beyond its edges.

    Args:
        x: the map.
        frame: cells that a tile takes from its neighbours on each side.

    Yields:
        Which images and rows of tiles, and `(B, t, u, C, n, n)` of them.
    """
    images, height, width, _ = (x := x.permute(0, 2, 3, 1)).shape
    rows, columns = -(-height // SIDE), -(-width // SIDE)
    wanted = AT_A_TIME * min(max(torch.get_num_threads(), 2), 16)
    many, high = max(wanted // (rows * columns), 1), max(wanted // columns, 1)
    for image in range(0, images, many):
        for row in range(0, rows, high):
            first, last = row * SIDE - frame, min(row + high, rows) * SIDE + frame
            cells = x[image : image + many, max(first, 0) : last]
            below = last - max(first, 0) - cells.shape[1]
            framed = F.pad(cells, (0, 0, frame, columns * SIDE - width + frame, max(-first, 0), below))
            tiles = framed.unfold(1, SIDE + 2 * frame, SIDE).unfold(2, SIDE + 2 * frame, SIDE)
            yield (slice(image, image + many), slice(row, row + high)), tiles


class _Scratch:
    """Two pieces of memory in which all parts of a map are worked on: fresh ones for each would take longer."""

    def __init__(self) -> None:
        self.filled, self.free = torch.empty(2, 0, dtype=torch.float32, device="cpu")

    def take(self, *shape: int) -> Tensor:
        """The free piece, or its beginning, which from now on is the filled one."""
        self.filled, self.free = self.free, self.filled
        if len(self.filled) < (size := math.prod(shape)):
            self.filled = self.filled.new_empty(size)
        return self.filled[:size].view(shape)

    def cells(self, tiles: Tensor) -> Tensor:
        """Tiles `(B, t, u, C, n, n)` -> `(n, n, B * t * u * C)`."""
        first = tiles.permute(4, 5, 0, 1, 2, 3)
        return self.take(*first.shape).copy_(first).flatten(2)

    def transform(self, matrix: Tensor, cells: Tensor) -> Tensor:
        """Rows, then columns, of cells `(n, n, N)` by a matrix `(m, n)`: `(m, m, N)`."""
        (m, n), count = matrix.shape, cells.shape[2]
        rows = torch.mm(matrix, cells.view(n, -1), out=self.take(m, n * count)).view(m, n, count)
        return torch.bmm(matrix.expand(m, m, n), rows, out=self.take(m, m, count))

    def multiply(self, values: Tensor, at_points: Tensor) -> Tensor:
        """Values `(6, 6, T * C)` times weights `(36, C, C')` -> `(6, 6, T * C')`."""
        points, channels, out = at_points.shape
        values = values.view(points, -1, channels)
        products = torch.bmm(values, at_points, out=self.take(points, values.shape[1], out))
        return products.view(PATCH, PATCH, -1)


@cache
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """In one dimension: a patch at the points, `(6, 6)`, a filter, `(6, 3)`, and a tile from their products, `(4, 6)`.

    The algorithm is the transpose of interpolation (Toom and Cook): the values of a patch are its sums with the
    coefficients of the polynomials that are 0 at all points but one. At infinity only the highest power counts.
    """
    roots = [np.delete(POINTS, i) for i in range(len(POINTS))]
    scale = np.array([np.prod(point - others) for point, others in zip(POINTS, roots, strict=True)])
    read, spread_, write = np.zeros((PATCH, PATCH)), np.zeros((PATCH, 3)), np.zeros((SIDE, PATCH))
    for row, others in enumerate(roots):
        read[row, :-1] = np.poly(others)[::-1]
    read[-1] = np.poly(POINTS)[::-1]
    spread_[:-1], write[:, :-1] = np.vander(POINTS, 3, True) / scale[:, None], np.vander(POINTS, SIDE, True).T
    spread_[-1, -1] = write[-1, -1] = 1
    with torch.inference_mode(False):
        for_patch, for_filter, for_tile = (torch.from_numpy(matrix).float() for matrix in (read, spread_, write))
    return for_patch, for_filter, for_tile
