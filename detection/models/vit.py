"""Plain vision transformers as backbones (Li et al. 2022, ViTDet): their pyramid, and attention in windows.

Shape shorthand:
    B: images     C: channels     h, w: cells of a map     N: tokens     P: prefix tokens (class, registers)
    s: side of a window in cells
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from timm.models import VisionTransformer
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn import functional as F

from detection.recipes import recorded

PATCH = 16  # pixels between the cells of the map that the simple feature pyramid starts from
GLOBAL_BLOCKS = 4


@recorded
class SimpleFeaturePyramid(nn.Module):
    """Maps of strides 4, 8, 16, 32 and 64 from one of stride 16 (section 3, figure 2).

    Deconvolutions make the finer maps and max pooling the coarser one; a 1x1 and a 3x3 convolution follow, each with
    layer normalisation. The last level is the one before, subsampled by 2, as in `FeaturePyramidNetwork`.

    Args:
        in_channels: channels of the maps that it is given, of which it takes the last.
        out_channels: channels of every output (256 in the paper).
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int = 256) -> None:
        super().__init__()
        c = in_channels[-1]
        double, last = nn.ConvTranspose2d(c, c // 2, 2, stride=2), nn.ConvTranspose2d(c // 2, c // 4, 2, stride=2)
        quadruple = nn.Sequential(nn.ConvTranspose2d(c, c // 2, 2, stride=2), LayerNorm2d(c // 2), nn.GELU(), last)
        # rounded up, so that every cell is seen
        halve = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.scales = nn.ModuleList([quadruple, double, nn.Identity(), halve])
        widths = (c // 4, c // 2, c, c)
        self.blocks = nn.ModuleList(_smooth(width, out_channels) for width in widths)

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Maps, the last `(B, C, h, w)` -> "0" to "3" and `pool`, `(B, out_channels, 4 h, 4 w)` the finest of them."""
        last = list(features.values())[-1]
        outputs = {
            str(i): block(scale(last)) for i, (scale, block) in enumerate(zip(self.scales, self.blocks, strict=True))
        }
        outputs["pool"] = outputs["3"][..., ::2, ::2]
        return outputs


def _smooth(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )


def attend_in_windows(network: nn.Module, size: int) -> None:
    """Keep the attention of a ViT within windows, but for 4 evenly spaced blocks, the last among them (section 3).

    The weights and their names stay as they are.

    Args:
        network: built for images of any size; is changed in place.
        size: s, side of a window in cells (14 in the paper).

    Raises:
        ValueError: the network is no ViT, or one whose blocks have no attention layer of their own.
    """
    if not isinstance(network, VisionTransformer) or not all(hasattr(block, "attn") for block in network.blocks):
        raise ValueError(f"window_size is for plain ViTs, which {type(network).__name__} isn't: leave it out")
    windows = Windows(size, network.num_prefix_tokens)
    network.patch_embed.register_forward_hook(windows.note_grid)
    depth = len(network.blocks)
    whole = {(i + 1) * depth // GLOBAL_BLOCKS - 1 for i in range(GLOBAL_BLOCKS)}
    for index, block in enumerate(network.blocks):
        if index not in whole:
            block.attn.register_forward_pre_hook(windows.split, with_kwargs=True)
            block.attn.register_forward_hook(windows.join)


class Windows:
    """What goes before and after an attention layer to keep it within windows.

    Windows that stick out of the map are padded, and nothing attends to the padding. Prefix tokens attend to the tokens
    of each window, and become the mean over the windows. With one window this is attention to the whole map.

    Args:
        size: s.
        prefix: P.
    """

    def __init__(self, size: int, prefix: int) -> None:
        self.size, self.prefix = size, prefix
        self.grid = (0, 0)

    def note_grid(self, _: nn.Module, __: Any, patches: Tensor) -> None:
        """Remember h and w of patches `(B, h, w, C)`."""
        self.grid = (patches.shape[1], patches.shape[2])

    def split(self, _: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Tokens `(B, P + h * w, C)` -> those of each window, `(B * windows, P + s * s, C)`, and what to attend to."""
        prefix, cells = args[0][:, : self.prefix], args[0][:, self.prefix :].unflatten(1, self.grid)
        windows, padded = window_partition(cells, self.size)
        prefix = prefix.repeat_interleave(len(windows) // len(cells), 0)
        if padded != self.grid:
            inside = window_partition(cells.new_ones(1, *self.grid, 1), self.size)[0].flatten(1).bool()
            inside = F.pad(inside, (self.prefix, 0), value=True).repeat(len(cells), 1)
            kwargs = kwargs | {"attn_mask": inside[:, None, None]}
        return (torch.cat([prefix, windows.flatten(1, 2)], 1),), kwargs

    def join(self, _: nn.Module, __: Any, tokens: Tensor) -> Tensor:
        """The way back."""
        prefix, windows = tokens[:, : self.prefix], tokens[:, self.prefix :].unflatten(1, (self.size, self.size))
        height, width = (-(-side // self.size) * self.size for side in self.grid)
        cells = window_unpartition(windows, self.size, self.grid, (height, width))
        prefix = prefix.unflatten(0, (len(cells), len(windows) // len(cells))).mean(1)
        return torch.cat([prefix, cells.flatten(1, 2)], 1)
