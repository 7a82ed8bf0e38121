"""Convolutions and matrix products for inference on a CPU: their weights are cast and laid out for the kernel once.

PyTorch does both in every call. With one small image that takes longer than the arithmetic of the last stages, and in
bfloat16, which autocast makes from float32 each time, than most of the network's.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn

PLAIN = (nn.Conv2d, Conv2dSame)


def pack(network: nn.Module) -> None:
    """Replace the plain convolutions and linear layers of a network, whose weights must not change any more."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and type(child) in PLAIN and child.padding_mode == "zeros":
                setattr(parent, name, PackedConv2d(child))
            elif type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))


class Packing:
    """The weights of a layer as the kernel of each precision wants them, beside those that it has.

    On another device, in another precision, where gradients are wanted, or where PyTorch comes without oneDNN, the
    layer is computed as ever.
    """

    weight: Tensor
    bias: Any

    def take(self, layer: nn.Conv2d | nn.Linear) -> None:
        """Share the weights of a layer."""
        self.weight, self.bias = layer.weight, layer.bias
        self.packed: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"packed": {}}  # the kernels' layouts can neither be copied nor saved

    def cast(self, x: Tensor) -> Tensor | None:
        """The input in the precision of this call, if there is a kernel for it."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
            return None
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        known = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return x.to(dtype) if known and x.numel() else None

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight in the kernel's layout, and bias, both in the precision of x, whose size the layout is chosen for."""
        if x.dtype not in self.packed:
            # Tensors made in inference mode may be used in it alone; these outlive it.
            with torch.inference_mode(False):
                bias = None if self.bias is None else self.bias.detach().to(x.dtype)
                self.packed[x.dtype] = self.lay_out(self.weight.detach().to(x.dtype), list(x.shape)), bias
        return self.packed[x.dtype]

    def lay_out(self, weight: Tensor, shape: list[int]) -> Tensor:
        """The weight in the layout that suits inputs of a shape."""
        raise NotImplementedError


class PackedConv2d(Packing, nn.Conv2d):
    """`nn.Conv2d` for inference."""

    def __init__(self, conv: nn.Conv2d) -> None:
        geometry: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        size: Any = conv.kernel_size
        nn.Conv2d.__init__(self, conv.in_channels, conv.out_channels, size, **geometry, bias=False, device="meta")
        self.pads_same = isinstance(conv, Conv2dSame)  # TensorFlow's padding, which depends on the input's size
        self.take(conv)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C', h', w')`."""
        if self.pads_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
        cast = self.cast(x)
        if cast is None:
            return nn.Conv2d.forward(self, x)
        geometry = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(cast, *self.weights(cast), *geometry, "none", [], "")

    def lay_out(self, weight: Tensor, shape: list[int]) -> Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        return reorder(weight.to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, shape)


class PackedLinear(Packing, nn.Linear):
    """`nn.Linear` for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Linear.__init__(self, linear.in_features, linear.out_features, bias=False, device="meta")
        self.take(linear)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C)` -> `(..., C')`."""
        cast = self.cast(x)
        if cast is None:
            return nn.Linear.forward(self, x)
        return torch.ops.mkldnn._linear_pointwise(cast, *self.weights(cast), "none", [], "")

    def lay_out(self, weight: Tensor, shape: list[int]) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, torch.Size(shape[:-1]).numel())
