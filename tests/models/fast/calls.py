"""What the kernels of PyTorch are called with."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Notes the arguments of each call of one operation, such as `torch.ops.aten.add.Tensor`."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation
        self.arguments: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.operation:
            self.arguments.append(args)
        return func(*args, **kwargs or {})
