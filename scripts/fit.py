#!/usr/bin/env python
"""Train a detector: python scripts/fit.py [--config FILE] [--data.root FOLDER ...]; see --help."""

import gc
import sys

gc.disable()  # importing makes a million objects and no garbage; looking for it takes a fifth of the time
from detection.cli.fit import main  # noqa: E402

gc.freeze()  # nor is there any later, here or in the loaders' processes, which would copy what they look at
gc.enable()

if __name__ == "__main__":
    sys.exit(main())
