"""Frozen normalisation folded into the convolution before it.

Frozen normalisation is a factor and a shift for each channel. A convolution whose weight is multiplied by the factor
and whose bias is the shift gives the same, without a pass over its output. Training computes that weight in each step,
as the convolution's own weight changes (`FoldedConv2d`); inference computes it once (`fold_for_good`).

Shape shorthand:
    B: images     C: channels     h, w: cells of a map
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from timm.layers import Conv2dSame, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from detection.fitting import trial
from detection.models.fast.convolution import QuickConv2d, conv2d
from detection.models.fast.padding import pad_same

PLAIN = (nn.Conv2d, QuickConv2d, Conv2dSame)  # that do nothing but a convolution, as a subclass or parametrised one may


class FoldedConv2d(nn.Conv2d):
    """A convolution that also carries out the frozen normalisation behind it.

    It computes the folded weight in each step, as the weight may train, and as the `state_dict` keeps the tensors of
    both modules apart, like torchvision's. That costs far less than two passes over the output. Under autocast the
    output stays in half precision, which float32 statistics would raise to float32.

    Args:
        conv: without bias; its weight is shared.
        norm: the normalisation, which does nothing more by itself.
    """

    def __init__(self, conv: nn.Conv2d, norm: FoldedNorm) -> None:
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        super().__init__(conv.in_channels, conv.out_channels, *geometry, bias=False, device="meta")  # type: ignore[arg-type]
        self.weight = conv.weight
        self.pads_same = isinstance(conv, Conv2dSame)  # TensorFlow's padding, which depends on the input's size
        self.norm = (norm,)  # in a tuple, so that the state_dict has it under its own name alone

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight `(C', C, n, n)` and bias `(C',)` of the one convolution that does both, in the weight's type.

        Statistics may be of another type: `bf16-true` and the like convert layers that have parameters alone.
        """
        norm = self.norm[0]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight, bias = self.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)` -> `(B, C', h', w')`, convolved and normalised."""
        if self.pads_same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        geometry: Any = self.stride, self.padding, self.dilation, self.groups
        slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and self.groups == self.in_channels
        if slow and torch.is_grad_enabled():
            # On a CPU the gradient of a depthwise convolution takes 2 to 50 times as long in bfloat16 as in float32.
            with torch.autocast("cpu", enabled=False):
                weight, bias = self.folded()
                return conv2d(x.float(), weight.float(), bias.float(), *geometry).to(x.dtype)
        return conv2d(x, *self.folded(), *geometry)


class FoldedNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """A frozen normalisation that the convolution before it carries out; it keeps the tensors for the `state_dict`.

    timm has normalisation and activation in one module. The activation stays here, as `after`.

    Args:
        norm: whose buffers are shared, and parameters where scale and shift learn.
    """

    def __init__(self, norm: FrozenBatchNorm2d | FrozenBatchNormAct2d) -> None:
        super().__init__(len(norm.weight), norm.eps)
        for name in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, name)
            setattr(self, name, value if isinstance(value, nn.Parameter) else value.detach())
        self.after = nn.Sequential(norm.drop, norm.act) if isinstance(norm, FrozenBatchNormAct2d) else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The input, which is normalised already, after the activation if there is one."""
        return self.after(x)


class OnePassNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """A frozen normalisation that no convolution can carry out, as those before the convolutions of DenseNet.

    torchvision's multiplies and adds in two passes, and gives float32 under autocast. This one gives what it gets.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)`, normalised."""
        return _normalise(self, x)


class OnePassNormAct(FrozenBatchNormAct2d):  # type: ignore[misc]
    """`OnePassNorm` of timm, with the activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, h, w)`, normalised and activated."""
        activated: Tensor = self.act(self.drop(_normalise(self, x)))
        return activated


def _normalise(norm: Any, x: Tensor) -> Tensor:
    values = norm.running_mean, norm.running_var, norm.weight, norm.bias
    is_double = x.dtype == torch.float64  # the kernels take halves with float32 statistics, but not doubles
    mean, var, weight, bias = (value.double() if is_double else value for value in values)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)


def fold_frozen_norms(network: nn.Module, example: Tensor) -> None:
    """Fold each frozen normalisation of a network into the convolution before it.

    Which convolution that is shows in a run: the one whose output is the input of the normalisation. A pair is folded
    where the convolution has no bias, runs once, and does not give one of the network's own outputs.

    Args:
        network: changed in place; its `state_dict` stays the same.
        example: an input for that run, e.g. a blank image `(1, 3, H, W)`.
    """
    outputs: list[tuple[nn.Conv2d, Tensor]] = []
    pairs: list[tuple[nn.Conv2d, FrozenBatchNorm2d | FrozenBatchNormAct2d]] = []

    def note_output(conv: nn.Module, _: object, output: Tensor) -> None:
        outputs.append((conv, output))  # type: ignore[arg-type]

    def note_input(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((conv, norm) for conv, output in outputs if output is inputs[0])  # type: ignore[misc]

    modules = list(network.modules())
    frozen = [m for m in modules if isinstance(m, FrozenBatchNorm2d | FrozenBatchNormAct2d)]
    frozen = [m for m in frozen if not isinstance(m, FoldedNorm)]  # it has been folded before, and does nothing
    if not frozen:
        return
    hooks = [m.register_forward_hook(note_output) for m in modules if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(note_input) for m in frozen]
    with trial(network):
        results = tree_leaves(network(example))
    for hook in hooks:
        hook.remove()
    uses = Counter(id(conv) for conv, _ in outputs)
    uses.update(id(conv) for conv, output in outputs if any(output is result for result in results))
    replaced: dict[int, nn.Module] = {}
    for conv, norm in pairs:
        if conv.bias is None and uses[id(conv)] == 1 and id(norm) not in replaced and type(conv) in PLAIN:
            replaced[id(norm)] = statistics = FoldedNorm(norm)
            replaced[id(conv)] = FoldedConv2d(conv, statistics)
    for parent in modules:
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])


def fold_for_good(network: nn.Module) -> None:
    """Replace the folded convolutions by plain ones with the folded weight and a bias, for inference.

    The `state_dict` changes: weights can no longer be trained or loaded. The activation in timm's normalisation moves
    right behind the convolution.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FoldedConv2d):
                with torch.no_grad():
                    weight, bias = child.folded()
                geometry: Any = (child.kernel_size, child.stride, child.padding, child.dilation, child.groups)
                kind = Conv2dSame if child.pads_same else nn.Conv2d
                conv: nn.Conv2d = kind(child.in_channels, child.out_channels, *geometry)
                conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
                after, child.norm[0].after = child.norm[0].after, nn.Identity()
                setattr(parent, name, nn.Sequential(conv, *after) if isinstance(after, nn.Sequential) else conv)
