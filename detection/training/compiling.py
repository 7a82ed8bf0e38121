"""Changes of a detector that training asks for: activations computed again, and parts compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import Conv2dSame

from detection.models.two_stage import FasterRCNN


def checkpoint_activations(detector: FasterRCNN) -> None:
    """Let the backbone's body compute its activations again in the backward pass; a ValueError if it can't."""
    try:
        detector.backbone.body.set_grad_checkpointing()  # type: ignore[operator]
    except (AttributeError, AssertionError) as error:  # timm's networks that can't have an assertion
        kind = type(getattr(detector.backbone.body, "network", detector.backbone.body)).__name__
        raise ValueError(
            f"the backbone's {kind} can't compute its activations again: leave model.grad_checkpointing out, and lower "
            "data.batch_size if memory is short"
        ) from error


def compile_parts(detector: FasterRCNN, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile, in place and without new names in the `state_dict`, what does the same arithmetic on every image.

    Backbone with pyramid, the RPN's convolutions, and box and mask heads. What picks boxes (matching, sampling, NMS)
    stays as it is. One graph serves batches of all sizes, but for backbones with TensorFlow's padding (EfficientNet),
    which follows from the size: they have a graph for each size, and beyond eight run as they are.

    Args:
        detector: whose parts are compiled.
        backend: of `torch.compile`.
    """
    by_size = any(isinstance(m, Conv2dSame) or getattr(m, "pads_same", False) for m in detector.backbone.modules())
    detector.backbone.compile(backend=backend, dynamic=not by_size)
    for name, part in detector.named_modules():
        if name == "rpn.head":
            part.compile(backend=backend, dynamic=True)
        elif name.endswith(("box_head", "box_predictor", "mask_head", "mask_predictor")):
            part.compile(backend=backend)
