"""An augmentation: a transform in albumentations' form, which goes into a pipeline beside albumentations' own."""

from __future__ import annotations

from typing import Any

import albumentations as A
import numpy as np
from numpy.typing import NDArray


class Tint(A.ImageOnlyTransform):  # type: ignore[misc]
    """Multiplies each channel by a factor of its own, as lamps of another colour do.

    Args:
        strength: factors are drawn from 1 - strength to 1 + strength.
        p: how often.
    """

    def __init__(self, strength: float = 0.2, p: float = 0.5) -> None:
        super().__init__(p=p)
        self.strength = strength

    def get_params(self) -> dict[str, Any]:
        """Draw the factors, from the pipeline's own generator, so that a resumed run draws the same."""
        factors = [self.py_random.uniform(1 - self.strength, 1 + self.strength) for _ in range(3)]
        return {"factors": np.array(factors)}

    def apply(self, img: NDArray[np.uint8], factors: NDArray[np.float64], **params: Any) -> NDArray[np.uint8]:
        """Image `(H, W, 3)` -> tinted."""
        return (img * factors).clip(0, 255).astype(np.uint8)
