"""Memory that tensors leave is kept for those to come, by the command alone."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from detection.freed_memory import SETTINGS

# How often the kernel gives a page to a tensor of 60 MB, just after one of 64 MB was freed. One as large need not fit
# in its place: the C library leaves room for alignment.
PROGRAM = """
from contextlib import suppress
from resource import RUSAGE_SELF, getrusage

import torch
from detection.__main__ import main
from detection.freed_memory import keep_freed_memory

{call}

torch.ones(16_000_000)
before = getrusage(RUSAGE_SELF).ru_minflt
torch.ones(15_000_000)
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


def pages(call: str, **environment: str) -> int:
    others = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    ran = subprocess.run(command, env=others | environment, check=True, capture_output=True, text=True)
    return int(ran.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what Linux's kernel does")
def test_the_command_keeps_freed_memory_and_the_library_by_itself_does_not() -> None:
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("another C library than glibc")
    assert pages("") >= 30  # of 2 MiB each, or thousands of 4 KiB
    assert pages("assert keep_freed_memory()") < 10
    assert pages("with suppress(SystemExit):\n    main(['verify', '--help'])") < 10
    assert pages("assert not keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="1000") >= 30
