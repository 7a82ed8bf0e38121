"""R-CNN's own parts: every region is cut from the image, warped to one size, and goes through the whole network alone.

R-CNN (Girshick et al. 2014), section 2 and appendices A and C. In the place of a backbone stands the image itself, the
pooler warps, and the box head is the classification network. What differs from the paper, which had no autograd:
- Classes come from the softmax, and boxes from a regressor of each class that trains with it and with the network. The
  paper fine-tuned with a softmax, then fitted support vector machines and ridge regressors to stored features, which
  took hundreds of gigabytes and taught the network nothing. Fast R-CNN (Girshick 2015) found one training with the
  softmax to be no worse than stages with the machines (sections 5.1 and 5.4).
- Boxes are regressed from the fully connected layers like the classes; the paper regressed from the map below them.
- One rule says what is foreground, IoU of at least 0.5, the paper's for fine-tuning. Its machines had the objects alone
  as positives and IoU below 0.3 as negatives, and its regressors learnt from IoU above 0.6 (appendices B and C).

Shape shorthand:
    B: images     P: regions an image     R = B * P     o: side of a warped region     p: context around it
    C: channels of the network's last map     F: features of a region
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detection.models.backbones import Backbone, Norm, ResNetName, Trunk, efficientnet_lite0_fpn, resnet_network
from detection.models.pooling import align
from detection.models.roi_heads import TwoFCHead
from detection.parts import FeatureMaps
from detection.recipes import recorded
from detection.weights import Weights

CONTEXT = 16 / 227  # of the side of a warped region: the paper's p for its network's input (appendix A)
LAST_STRIDE = 32  # pixels, of the last map of all networks here


class WholeImage(nn.Module):
    """The normalised image as the only feature map, for `Backbone`."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images `(B, 3, H, W)` -> themselves."""
        return {"0": images}


def whole_image() -> Backbone:
    """A backbone without a network: one map of stride 1, the image itself."""
    return Backbone(WholeImage(), [3], (1,), out_channels=None)


@recorded
class RegionWarp(nn.Module):
    """Cuts each region from the image and warps it to a square, with some of its surroundings (appendix A).

    The region is widened so that after warping there are p pixels of context on every side. Outside of the image the
    value is 0, which is the mean colour after normalisation, as in the padding of a batch. A region that gets smaller
    is averaged over all its pixels.

    Args:
        output_size: o.
        context: p.

    Raises:
        ValueError: the context leaves no room for the region.
    """

    def __init__(self, output_size: int = 224, context: int = 16) -> None:
        super().__init__()
        if not 0 <= 2 * context < output_size:
            raise ValueError(f"context {context} on both sides leaves nothing of {output_size} pixels for the region")
        self.output_size, self.context = output_size, context

    def forward(self, features: FeatureMaps, boxes: Tensor) -> Tensor:
        """The first of the maps `(B, 3, H, W)` at boxes `(B, P, 4)` in image pixels -> `(B * P, 3, o, o)`."""
        image = features.maps[0]
        boxes = boxes.float().nan_to_num(0.0, 0.0, 0.0)
        margin = (boxes[..., 2:] - boxes[..., :2]) * (self.context / (self.output_size - 2 * self.context))
        boxes = torch.cat((boxes[..., :2] - margin, boxes[..., 2:] + margin), dim=-1)
        index = torch.arange(len(boxes), device=boxes.device).repeat_interleave(boxes.shape[1])
        rois = torch.cat((index[:, None].to(boxes), boxes.flatten(0, 1)), dim=1)
        return align(image.float(), rois, self.output_size, 1 / features.strides[0], aligned=True).to(image.dtype)


class CNNHead(nn.Module):
    """A classification network's layers up to its last map, and two fully connected ones on that map.

    The paper's network has this form (its pool5, fc6 and fc7). Newer networks average the map. That would lose where in
    the region the object is, which the box deltas depend on.

    Args:
        body: warped regions `(R, 3, o, o)` -> named maps, of which the last counts.
        in_channels: C.
        map_size: side of that map.
        out_channels: F.
    """

    chunk = 256  # regions at a time where no gradient is wanted: thousands at once would need gigabytes

    def __init__(self, body: nn.Module, in_channels: int, map_size: int, out_channels: int = 1024) -> None:
        super().__init__()
        self.body = body
        self.head = TwoFCHead(in_channels, map_size, out_channels)
        self.out_channels = out_channels

    def forward(self, warped: Tensor) -> Tensor:
        """Regions `(R, 3, o, o)` -> features `(R, F)`."""
        parts = [warped] if torch.is_grad_enabled() else warped.split(self.chunk)
        return torch.cat([self.head(list(self.body(part).values())[-1]) for part in parts])


def resnet_head(
    crop_size: int,
    name: ResNetName = "resnet18",
    weights: Weights = None,
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    out_channels: int = 1024,
) -> CNNHead:
    """A head on all four stages of a torchvision ResNet; arguments as for `backbones.resnet_fpn`.

    Args:
        crop_size: side of a warped region in pixels.
        name, weights, trainable_layers, norm: see `backbones.resnet_fpn`.
        out_channels: of the fully connected layers.
    """
    network = resnet_network(name, weights, trainable_layers, norm)
    body = Trunk(dict(network.named_children()), {"layer4": "0"})
    return CNNHead(body, network.inplanes, -(-crop_size // LAST_STRIDE), out_channels)


def efficientnet_lite0_head(
    crop_size: int,
    weights: Weights = "IMAGENET1K",
    trainable_layers: int | None = None,
    norm: Norm | None = None,
    out_channels: int = 1024,
) -> CNNHead:
    """A head on all stages of EfficientNet-Lite0; arguments as for `backbones.efficientnet_lite0_fpn`.

    Args:
        crop_size: side of a warped region in pixels.
        weights, trainable_layers, norm: see `backbones.efficientnet_lite0_fpn`.
        out_channels: of the fully connected layers.
    """
    backbone = efficientnet_lite0_fpn(weights, norm, trainable_layers=trainable_layers)
    return CNNHead(backbone.body, backbone.in_channels[-1], -(-crop_size // LAST_STRIDE), out_channels)
