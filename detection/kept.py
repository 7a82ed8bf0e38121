"""Tensors that follow from a few Python numbers, made once for a device and kept.

A tensor of Python numbers lies in the host's memory first. To copy it to an accelerator is quick, but the host waits
until all that it has queued before is done. So constants are numbers where they can be, and kept where they can't.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Kept(Generic[T]):
    """The last few of what was made.

    Args:
        count: how many are kept. Images come in many sizes.
    """

    def __init__(self, count: int = 16) -> None:
        self.count = count
        self.made: dict[Hashable, T] = {}

    def __call__(self, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for this key, or is made now. Keys name the device."""
        if key not in self.made:
            if len(self.made) >= self.count:
                self.made.pop(next(iter(self.made)))
            # What outlives the call must not be an inference tensor, which training can't use.
            with torch.inference_mode(False):
                self.made[key] = make()
        return self.made[key]


def table(part: Any, rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Rows of whole numbers, all of one length, on the device, int64, kept by the part that asks for them."""
    kept: Kept[Tensor] = part.__dict__.setdefault("_tables", Kept())
    return kept((rows, str(device)), lambda: torch.tensor(rows, dtype=torch.int64, device=device))
