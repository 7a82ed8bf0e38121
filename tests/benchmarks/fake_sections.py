"""Sections that do what no section should, for the process that runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from detection.benchmarks.gpu import Row, Section, Setting


def good(setting: Setting) -> Iterator[Row]:
    yield {"pid": os.getpid(), "in_time": setting.left > 0}


def hangs(setting: Setting) -> Iterator[Row]:
    """With a process of its own, and deaf to all that can be ignored."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {"pid": os.getpid(), "child": child.pid}
    time.sleep(600)


def dies(setting: Setting) -> Iterator[Row]:
    yield {"pid": os.getpid()}
    os._exit(3)


def fails(setting: Setting) -> Iterator[Row]:
    yield {"pid": os.getpid()}
    raise ValueError("a bug")


FAKES = {name: Section(globals()[name], 1) for name in ("good", "hangs", "dies", "fails")} | {"last": Section(good, 1)}
