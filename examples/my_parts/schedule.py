"""A schedule, see `Schedule` in `detection.training.optimisation`. A function will do, and so for any part."""

from __future__ import annotations


def triangle(step: int, total_steps: int) -> float:
    """The factor of the rate: up to 1 during the first fifth of all steps, then down to 0."""
    done = step / max(1, total_steps)
    return max(5 * done, 0.01) if done < 0.2 else (1 - done) / 0.8
