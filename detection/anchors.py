"""Anchors: reference boxes of several sizes and shapes at every cell of every feature map.

Faster R-CNN (Ren et al. 2015), section 3.1.1; one size a pyramid level after FPN (Lin et al. 2017), section 4.1.

Shape shorthand:
    L: pyramid levels     H, W: padded height and width     h, w: cells of a level
    k: anchors a cell     A: anchors of all levels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from detection.kept import Kept
from detection.recipes import recorded


@recorded
class AnchorGenerator(nn.Module):
    """Lays the same anchors over every cell of each feature map.

    Args:
        sizes: for each level the anchor sizes, the square root of the area, in pixels of the input image.
        aspect_ratios: the height/width ratios, either once for all levels or for each level.
        offset: where in its cell an anchor is centred, in units of the stride: 0 is the cell's top left corner
            (torchvision, Detectron2), 0.5 its middle.
        round_anchors: whole-pixel anchors as torchvision has them; False keeps exact corners (Detectron2, MMDetection).
        ratio_is_width_over_height: read `aspect_ratios` as width/height.
        infer_strides: torchvision's strides, `image side // cells`, in place of the declared ones. They are wrong
            wherever a level does not divide the image evenly (61 in place of 64 rows for P6 at 800 pixels), so this is
            only for weights that were trained with them, and for comparisons.

    Raises:
        ValueError: `sizes` and `aspect_ratios` name different numbers of levels.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
        aspect_ratios: Sequence[float] | Sequence[Sequence[float]] = (0.5, 1.0, 2.0),
        offset: float = 0.0,
        round_anchors: bool = True,
        ratio_is_width_over_height: bool = False,
        infer_strides: bool = False,
    ) -> None:
        super().__init__()
        self.sizes = tuple(tuple(s) if isinstance(s, Sequence) else (s,) for s in sizes)
        per_level = [tuple(r) for r in aspect_ratios if isinstance(r, Sequence)]
        shared = tuple(float(r) for r in aspect_ratios if not isinstance(r, Sequence))
        ratios = per_level or [shared] * len(self.sizes)
        if len(ratios) != len(self.sizes):
            raise ValueError(f"anchor sizes are given for {len(self.sizes)} levels, aspect ratios for {len(ratios)}")
        if ratio_is_width_over_height:
            ratios = [tuple(1 / r for r in level) for level in ratios]
        self.offset, self.infer_strides = offset, infer_strides
        self._cells = [cell_anchors(s, r, round_anchors) for s, r in zip(self.sizes, ratios, strict=True)]
        self._own, self._laid = Kept[list[Tensor]](), Kept[list[Tensor]]()  # by device; by device and sizes

    def num_anchors_per_location(self) -> list[int]:
        """The number of anchors a cell of each level, k; torchvision has this method, too."""
        return [len(cell) for cell in self._cells]

    def forward(
        self,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int],
        image_size: tuple[int, int],
        device: torch.device | str = "cpu",
    ) -> list[Tensor]:
        """Anchors of every level, the same for all images of a batch.

        Args:
            shapes: `(h, w)` of each level.
            strides: pixels between neighbouring cells of each level.
            image_size: `(H, W)` of the padded batch; only read with `infer_strides`.
            device: where the anchors are wanted.

        Returns:
            L tensors `(h * w * k, 4)` float32 xyxy in pixels of the image, ordered by row, then column, then anchor.

        Raises:
            ValueError: the number of levels is not that of the anchor sizes.
        """
        if not len(shapes) == len(strides) == len(self._cells):
            raise ValueError(
                f"anchors are defined for {len(self._cells)} levels, but the backbone gives {len(shapes)} feature maps "
                f"with {len(strides)} strides: give as many anchor sizes as levels"
            )
        steps = [
            (image_size[0] // h, image_size[1] // w) if self.infer_strides else (stride, stride)
            for (h, w), stride in zip(shapes, strides, strict=True)
        ]
        cells = self._own(str(device), lambda: [cell.to(device) for cell in self._cells])
        levels = zip(cells, shapes, steps, strict=True)
        if torch.compiler.is_exporting():  # where sides are symbols, by which nothing can be looked up
            return [self._lay(*level) for level in levels]
        return self._laid((tuple(shapes), tuple(steps), str(device)), lambda: [self._lay(*level) for level in levels])

    def _lay(self, cell: Tensor, shape: tuple[int, int], step: tuple[int, int]) -> Tensor:
        y, x = (
            (torch.arange(count, dtype=torch.float32, device=cell.device) + self.offset) * pixels
            for count, pixels in zip(shape, step, strict=True)
        )
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack((grid_x, grid_y, grid_x, grid_y), dim=-1)
        return (shifts[:, :, None] + cell).reshape(-1, 4)


Anchors: TypeAlias = AnchorGenerator | Literal["auto"] | None  # as builders take them


def chosen_anchors(anchors: Anchors, num_levels: int, **options: Any) -> AnchorGenerator:
    """The generator that is given, or `default_anchors`.

    Raises:
        ValueError: it is `auto`, which only a run can follow, as it has the data.
    """
    if isinstance(anchors, str):
        raise ValueError(
            f"rpn_anchor_generator: {anchors} is for `detection fit`, which fits anchors to the data; in Python give "
            "an AnchorGenerator, such as detection.data.anchor_fit.generator_for(index, strides, min_size, max_size)"
        )
    return anchors or default_anchors(num_levels, **options)


def default_anchors(num_levels: int, **options: Any) -> AnchorGenerator:
    """Five sizes from 32 to 512 pixels: one on each of five levels (FPN, section 4.1), else all five on each level."""
    sizes = (32, 64, 128, 256, 512)
    return AnchorGenerator([[s] for s in sizes] if num_levels == len(sizes) else [sizes] * num_levels, **options)


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], round_anchors: bool = True) -> Tensor:
    """The anchors of a cell centred at the origin, `(k, 4)` float32, ordered by ratio, then size.

    A size s and a ratio r = height/width give a box of area s**2: width s / sqrt(r), height s * sqrt(r).
    """
    root = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()[:, None]
    size = torch.tensor(sizes, dtype=torch.float32)
    half_width, half_height = (size / root).flatten() / 2, (size * root).flatten() / 2
    anchors = torch.stack((-half_width, -half_height, half_width, half_height), dim=1)
    return anchors.round() if round_anchors else anchors
