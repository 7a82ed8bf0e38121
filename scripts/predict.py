"""Detect in images, videos or a camera's pictures: `python scripts/predict.py --ckpt RUN/best.ckpt --source photos`."""

from __future__ import annotations

import sys

from detection.cli.flags import run_command
from detection.cli.predict import main

if __name__ == "__main__":
    sys.exit(run_command(main, ValueError))
