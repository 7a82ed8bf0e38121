"""Evaluate a checkpoint on any data, or a COCO results file: `python scripts/evaluate.py --ckpt RUN/best.ckpt`."""

from __future__ import annotations

import sys

from detection.cli.evaluate import evaluate
from detection.cli.flags import run_command

if __name__ == "__main__":
    sys.exit(run_command(evaluate, ValueError))
