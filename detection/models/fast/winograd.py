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
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from detection.devices import has_avx512, may_be_quick
from detection.models.fast.twice import convolution_backward

POINTS = np.array([0, 3 / 4, -3 / 4, 3 / 2, -3 / 2])  # and infinity
SINGLE_CELLS: Any = ([0, 0], [1, 1], [1, 1])  # a 1x1 convolution's padding, stride and dilation
SIDE, PATCH = 4, 6  # cells of a tile, and of the patch that its outputs are read from
AT_A_TIME = 56  # tiles, for each thread: 2.1 MB of 256 channels
FEWEST_CHANNELS = 96  # with fewer the usual kernel is quicker
FEWEST_TILES = 64  # likewise
FEWEST_TILES_AVX512 = 250  # where the usual kernel is twice as quick
FEWEST_TILES_SPREAD = 24  # for a weight that is at the points already
Activation = Callable[[Tensor], Tensor]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution `(B, C', h, w)` of a map `(B, C, h, w)` with a weight `(C', C, 3, 3)` and a padding of 1."""
    y: Tensor = _Filtering.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y.contiguous() if x.is_contiguous() and weight.is_contiguous() else y  # as PyTorch's, which may be viewed


def is_filtered(
    x: Tensor, shape: torch.Size, stride: Any, padding: Any, dilation: Any, groups: int, is_spread: bool = False
) -> bool:
    """Whether minimal filtering is the quicker way for an input and a weight of this shape, which may be spread.

    Args:
        x: `(B, C, h, w)`.
        shape: of the weight, `(C', C, n, n)`.
        stride, padding, dilation, groups: of the convolution.
        is_spread: whether it is at the points already, see `AtPoints`.
    """
    if not may_be_quick(x) or x.ndim != 4:
        return False
    if shape[2:] != (3, 3) or groups != 1 or min(shape[:2]) < FEWEST_CHANNELS:
        return False
    if any(value not in (1, (1, 1)) for value in (stride, padding, dilation)):
        return False
    # In detection the images of a batch don't count, so that each rounds in it as it does alone.
    tiles = (1 if is_spread else len(x)) * -(-x.shape[-2] // SIDE) * -(-x.shape[-1] // SIDE)
    fewest = FEWEST_TILES_AVX512 if has_avx512() else FEWEST_TILES
    return tiles >= (FEWEST_TILES_SPREAD if is_spread else fewest)


class AtPoints:
    """A weight `(C', C, 3, 3)` at the points, as the kernel that multiplies there reads it.

    The products of matrices, one for each point, are a convolution of 36 groups. With AVX-512 oneDNN's takes less than
    half the time of the BLAS where that leaves AVX-512 out (MKL on AMD's processors); elsewhere they are alike.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.packed: dict[int, Tensor] = {}  # for each number of tiles, by which oneDNN chooses the order
        self.orders: dict[bytes, Tensor] = {}  # mostly one for all of them

    def multiply(self, values: Tensor) -> Tensor:
        """Values `(T, 36, C)` -> `(T, 36, C')`."""
        if not has_avx512():
            return torch.bmm(values.transpose(0, 1), self.matrices.transpose(1, 2)).transpose(0, 1)
        tiles, points = values.shape[:2]
        if tiles not in self.packed:
            self.packed[tiles] = self._pack(tiles)
        maps = values.view(1, tiles, 1, -1).permute(0, 3, 1, 2)
        convolve = torch.ops.mkldnn._convolution_pointwise
        products: Tensor = convolve(maps, self.packed[tiles], None, *SINGLE_CELLS, points, "none", [], "")
        return products.permute(0, 2, 3, 1).view(tiles, points, -1)

    @cached_property
    def matrices(self) -> Tensor:
        """`(36, C', C)`."""
        with torch.inference_mode(False):  # it outlives the call
            return self._spread()

    def _spread(self) -> Tensor:
        out, channels = self.weight.shape[:2]
        cells = self.weight.permute(2, 3, 0, 1).reshape(1, 9, -1)
        return _Scratch().transform(_transforms()[1], cells).view(-1, out, channels)

    def _pack(self, tiles: int) -> Tensor:
        """The weight in oneDNN's order for so many tiles. In another one each call would order it anew."""
        with torch.inference_mode(False):
            matrices = self._spread()
            points, out, channels = matrices.shape
            plain = matrices.view(points * out, channels, 1, 1).to_mkldnn()
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            packed = reorder(plain, *SINGLE_CELLS, points, [1, points * channels, tiles, 1])
            order = torch.ops.mkldnn._get_mkldnn_serialized_md(packed)
            return self.orders.setdefault(order.numpy().tobytes(), packed)


def filtered(x: Tensor, weight: AtPoints, bias: Tensor | None = None, activation: Activation | None = None) -> Tensor:
    """The convolution `(B, C', h, w)` of a map `(B, C, h, w)`, and the activation behind it."""
    read, _, write = _transforms()
    shift = x.new_zeros(()) if bias is None else bias
    shape = (len(x), len(weight.weight), *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    out = y.permute(0, 2, 3, 1)
    scratch, count = _Scratch(), 0
    for images, rows, patches in _tiles(x, 1):
        tiles = patches.shape[:3]
        # The last tiles are as many as the others, some of them of no use: an order of the weight fits all.
        count = count or -(-math.prod(tiles) // 8) * 8
        products = weight.multiply(scratch.transform(read, scratch.cells(patches, count)))
        found = scratch.transform(write, products)[: math.prod(tiles)].view(*tiles, SIDE, SIDE, -1)
        found = found.permute(0, 1, 3, 2, 4, 5)
        found = torch.add(found, shift, out=scratch.take(*found.shape))
        part = out[images, rows.start * SIDE : rows.stop * SIDE]
        found = found.view(tiles[0], tiles[1] * SIDE, tiles[2] * SIDE, -1)[:, : part.shape[1], : part.shape[2]]
        part.copy_(found if activation is None else activation(found))
    return y


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient `(C', C, 3, 3)` of the weight from the input and the gradient `(B, C', h, w)` of the output."""
    read, spread, write = _transforms()
    total = x.new_zeros(PATCH * PATCH, x.shape[1], grad.shape[1])
    left, right = _Scratch(), _Scratch()
    for (*_, patches), (*_, tiles) in zip(_tiles(x, 1), _tiles(grad, 0), strict=True):
        values = left.transform(read, left.cells(patches))
        errors = right.transform(write.t(), right.cells(tiles))
        total.baddbmm_(values.permute(1, 2, 0), errors.transpose(0, 1))
    weight = _Scratch().transform(spread.t(), total.view(1, PATCH * PATCH, -1))
    return weight.view(3, 3, x.shape[1], grad.shape[1]).permute(3, 2, 0, 1)


class _Filtering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return filtered(x, AtPoints(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return convolution_backward(ctx, grad, (1, 1))
        back = filtered(grad, AtPoints(weight.flip(2, 3).transpose(0, 1))) if for_x else None
        return back, weight_gradient(x, grad) if for_weight else None, grad.sum((0, 2, 3)) if for_bias else None


def _tiles(x: Tensor, frame: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """A few hundred tiles at a time of a map `(B, C, h, w)`, with zeros beyond its edges.

    Args:
        x: the map.
        frame: cells that a tile takes from its neighbours on each side.

    Yields:
        Which images, which rows of tiles, and `(B, t, u, C, n, n)` of them.
    """
    images, height, width, _ = (x := x.permute(0, 2, 3, 1)).shape
    rows, columns = -(-height // SIDE), -(-width // SIDE)
    wanted = AT_A_TIME * min(max(torch.get_num_threads(), 2), 16)
    many, high = max(wanted // (rows * columns), 1), max(wanted // columns, 1)
    high = -(-rows // -(-rows // high))  # about the same in each part
    for image in range(0, images, many):
        for row in range(0, rows, high):
            first, last = row * SIDE - frame, min(row + high, rows) * SIDE + frame
            cells = x[image : image + many, max(first, 0) : last]
            below = last - max(first, 0) - cells.shape[1]
            framed = F.pad(cells, (0, 0, frame, columns * SIDE - width + frame, max(-first, 0), below))
            tiles = framed.unfold(1, SIDE + 2 * frame, SIDE).unfold(2, SIDE + 2 * frame, SIDE)
            yield slice(image, image + many), slice(row, row + high), tiles


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

    def cells(self, tiles: Tensor, count: int = 0) -> Tensor:
        """Tiles `(B, t, u, C, n, n)` -> `(T, n * n, C)`, of which what is beyond B * t * u is left as it is."""
        tiles = tiles.permute(0, 1, 2, 4, 5, 3)
        there = math.prod(tiles.shape[:3])
        cells = self.take(count or there, tiles.shape[3] * tiles.shape[4], tiles.shape[5])
        cells[:there].view(tiles.shape).copy_(tiles)
        return cells

    def transform(self, matrix: Tensor, cells: Tensor) -> Tensor:
        """Rows, then columns, of cells `(T, n * n, N)` by a matrix `(m, n)`: `(T, m * m, N)`."""
        (m, n), (tiles, _, size) = matrix.shape, cells.shape
        rows = torch.bmm(matrix.expand(tiles, m, n), cells.reshape(tiles, n, -1), out=self.take(tiles, m, n * size))
        columns = rows.view(tiles * m, n, size)
        out = self.take(tiles * m, m, size)
        return torch.bmm(matrix.expand(tiles * m, m, n), columns, out=out).view(tiles, m * m, size)


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
