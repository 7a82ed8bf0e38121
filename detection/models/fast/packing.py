"""Convolutions and linear layers for inference on a CPU, whose weights are packed once.

To pack a weight is to cast it to the precision of the call, and to order it in memory as oneDNN's kernel reads it.
PyTorch does both in every call. For one small image that takes longer than the arithmetic of the last stages; in
bfloat16, to which autocast casts from float32 each time, longer than that of most of the network.

The kernel of a convolution can also carry out the activation behind it and the sum of a residual block, which saves a
pass over memory each.

Shape shorthand:
    B: images     C, C': channels of input and output     h, w: cells of a map
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck

from detection.devices import has_kernels
from detection.models.backbones import Trunk
from detection.models.fast.folding import PLAIN, FoldedNorm
from detection.models.fast.linear import OneDNNLinear
from detection.models.fast.padding import pad_same
from detection.models.fast.winograd import AtPoints, filtered, is_filtered
from detection.models.roi_heads import TwoFCHead

LINEAR = {nn.Linear, OneDNNLinear}
# The kernels' names of activations, and their arguments.
ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
}


def pack(network: nn.Module) -> None:
    """Replace the plain convolutions and linear layers of a network by packed ones, in place.

    Its weights must not change afterwards.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and type(child) in PLAIN and child.padding_mode == "zeros":
                setattr(parent, name, PackedConv2d(child))
            elif type(child) is TwoFCHead and {type(child.fc6), type(child.fc7)} <= LINEAR:
                setattr(parent, name, PackedHead(child))
            elif isinstance(child, nn.Linear) and type(child) in LINEAR:
                setattr(parent, name, PackedLinear(child))
    for parent in list(network.modules()):
        if isinstance(parent, nn.Sequential | Trunk):
            _join_activations(parent)
        for name, child in list(parent.named_children()):
            if type(child) in (BasicBlock, Bottleneck) and _only_convolves(child):
                setattr(parent, name, PackedBlock(child))


def _join_activations(layers: nn.Module) -> None:
    """Let convolutions carry out the activations behind them, in layers that run one after the other."""
    conv: PackedConv2d | None = None
    for name, layer in list(layers.named_children()):
        if isinstance(layer, PackedConv2d):
            conv = layer
        elif conv is not None and type(layer) in ACTIVATIONS and not _does_nothing(layer):
            conv.activation, conv = layer, None
            setattr(layers, name, nn.Identity())
        elif not _does_nothing(layer):
            conv = None


def _does_nothing(layer: nn.Module) -> bool:
    return type(layer.after if isinstance(layer, FoldedNorm) else layer) is nn.Identity


def _only_convolves(block: nn.Module) -> bool:
    """Whether all normalisation of a residual block is folded into its convolutions."""
    norms = (layer for name, layer in block.named_children() if name.startswith("bn"))
    return all(map(_does_nothing, norms))


class Packing:
    """A layer that keeps its weight and bias packed, a copy for each precision that it was called in.

    The plain layer computes where there is no such kernel: on another device, in another precision, where gradients are
    wanted, or in a PyTorch without oneDNN.
    """

    weight: Tensor
    bias: Any

    def take(self, layer: nn.Conv2d | nn.Linear) -> None:
        """Share the weight and the bias of a plain layer."""
        self.weight, self.bias = layer.weight, layer.bias
        self.packed: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}
        self.packed_for: dict[torch.dtype, torch.Size] = {}
        self.unordered: Tensor | None = None  # a convolution's, for inputs of other sizes
        self.at_points: AtPoints | None = None  # of a 3x3 one, for minimal filtering

    def __getstate__(self) -> dict[str, Any]:
        # Packed tensors can neither be copied nor saved, and the other orders are those of the weight once more.
        return self.__dict__ | {"packed": {}, "packed_for": {}, "unordered": None, "at_points": None}

    def cast(self, x: Tensor) -> Tensor | None:
        """The input in the precision of this call, or None if there is no kernel for it."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
            return None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        known = dtype in (torch.float32, torch.bfloat16) and has_kernels(x.device, dtype)
        return x.to(dtype) if known and x.numel() else None

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Packed weight and bias in the precision of x. oneDNN chooses the order for the size of the first x."""
        if x.dtype not in self.packed:
            # Tensors made in inference mode can't be used outside of it, and these outlive it.
            with torch.inference_mode(False):
                bias = None if self.bias is None else self.bias.detach().to(x.dtype)
                self.packed[x.dtype] = self.lay_out(self.weight.detach().to(x.dtype), list(x.shape)), bias
            self.packed_for[x.dtype] = x.shape
        return self.packed[x.dtype]

    def lay_out(self, weight: Tensor, shape: list[int]) -> Tensor:
        """The weight in the kernel's order for inputs of this shape."""
        raise NotImplementedError


class PackedConv2d(Packing, nn.Conv2d):
    """`nn.Conv2d` for inference, with the activation behind it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        geometry: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        size: Any = conv.kernel_size
        nn.Conv2d.__init__(self, conv.in_channels, conv.out_channels, size, **geometry, bias=False, device="meta")
        self.pads_same = isinstance(conv, Conv2dSame)  # TensorFlow's padding, which depends on the input's size
        self.activation: nn.Module = nn.Identity()
        self.take(conv)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """`(B, C, h, w)` -> `(B, C', h', w')`, to which `other` `(B, C', h', w')` is added, then the activation."""
        if self.pads_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        cast = self.cast(x)
        if cast is None or (other is not None and other.shape[2:].numel() == 1):  # PyTorch 2.11 can't sum single pixels
            y = nn.Conv2d.forward(self, x)
            return self.activation(y if other is None else y.add_(other))  # in place, or its precision would change
        if is_filtered(cast, self.weight.shape, self.stride, self.padding, self.dilation, self.groups, is_spread=True):
            self.at_points = self.at_points or AtPoints(self.weight)  # from now on kept, four times as large
            if other is None:
                return filtered(cast, self.at_points, self.bias, self.activation)
            return self.activation(filtered(cast, self.at_points, self.bias).add_(other))
        geometry = self.padding, self.stride, self.dilation, self.groups
        name, values = ACTIVATIONS[type(self.activation)]
        convolve = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            return convolve(cast, *self.weights(cast), *geometry, name, values, "")
        rectifies = name == "relu"  # the one activation that the kernel carries out after a sum
        after: Any = ("add", 1.0, "relu" if rectifies else None, [], None)
        y = convolve.binary(cast, other.to(cast.dtype), *self.weights(cast), *geometry, *after)
        return y if rectifies else self.activation(y)

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Packed weight and bias; without AVX-512 for inputs of the first one's size alone.

        There the order depends on the size, and for another one the kernel would order the weight anew in each call,
        at up to 40 times the time of the convolution (oneDNN 3, AVX2). From the plain order it is a tenth of it.
        """
        weight, bias = super().weights(x)
        if x.shape == self.packed_for[x.dtype] or has_kernels(x.device, torch.bfloat16):
            return weight, bias
        if self.unordered is None:
            with torch.inference_mode(False):
                self.unordered = self.weight.detach().to(x.dtype, memory_format=torch.channels_last)
        return self.unordered, bias

    def lay_out(self, weight: Tensor, shape: list[int]) -> Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        return reorder(weight.to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, shape)


class PackedBlock(nn.Module):
    """A residual block of torchvision's ResNets for inference: packed convolutions with their activations and the sum.

    Args:
        block: whose convolutions are packed, with their normalisation folded.
    """

    def __init__(self, block: BasicBlock | Bottleneck) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(m for name, m in block.named_children() if name.startswith("conv")))
        self.downsample = block.downsample or nn.Identity()
        for conv in self.convs:
            conv.activation = block.relu

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C', h', w')`."""
        shortcut = self.downsample(x)
        *first, last = self.convs
        for conv in first:
            x = conv(x)
        return last(x, shortcut)


class PackedLinear(Packing, nn.Linear):
    """`nn.Linear` for inference."""

    def __init__(self, linear: nn.Linear, rectifies: bool = False) -> None:
        nn.Linear.__init__(self, linear.in_features, linear.out_features, bias=False, device="meta")
        self.rectifies = rectifies
        self.take(linear)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)` -> `(..., C')`, after a ReLU if it `rectifies`."""
        cast = self.cast(x)
        if cast is not None and has_kernels(x.device, torch.bfloat16):
            activation = "relu" if self.rectifies else "none"
            return torch.ops.mkldnn._linear_pointwise(cast, *self.weights(cast), activation, [], "")
        y = nn.Linear.forward(self, x) if cast is None else F.linear(cast, *self.weights(cast))
        return F.relu_(y) if self.rectifies else y

    def lay_out(self, weight: Tensor, shape: list[int]) -> Tensor:
        """The weight in the kernel's order; without AVX-512 transposed, for the BLAS, which is quicker than oneDNN."""
        if not has_kernels(weight.device, torch.bfloat16):
            return weight.t().contiguous().t()
        return torch.ops.mkldnn._reorder_linear_weight(weight, torch.Size(shape[:-1]).numel())


class PackedHead(nn.Module):
    """`TwoFCHead` for inference, whose first weight is ordered for features that lie channels last.

    So `GatherPooler` leaves them. To flatten them as the plain head does would move each number first.

    Args:
        head: whose linear layers are packed.
    """

    def __init__(self, head: TwoFCHead) -> None:
        super().__init__()
        fc6 = nn.Linear(head.fc6.in_features, head.fc6.out_features, device="meta")
        weight = head.fc6.weight.detach().unflatten(1, (head.in_channels, -1)).transpose(1, 2).flatten(1)
        fc6.weight, fc6.bias = nn.Parameter(weight, requires_grad=False), head.fc6.bias
        self.fc6, self.fc7 = PackedLinear(fc6, rectifies=True), PackedLinear(head.fc7, rectifies=True)
        self.out_channels = head.out_channels

    def forward(self, pooled: Tensor) -> Tensor:
        """`(R, C, o, o)` -> `(R, out_channels)`."""
        rows = pooled.permute(0, 2, 3, 1).flatten(1)
        return self.fc7(self.fc6(rows))
