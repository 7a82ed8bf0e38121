"""Locks of folders that one process at a time may write to; a lock is gone when its process is, however that ended."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detection.errors import RunError

LOCK = ".lock"  # in the folder of a run
PATIENCE, POLL = 5.0, 0.1  # seconds that a killed process may take to be gone, and between two looks
_held: set[int] = set()


def locked(path: Path) -> int | None:
    """A lock, as an open file, which may be passed on to a process; None where another process has it.

    Args:
        path: of the lock's file, which is made, with its folder. Where its file system has no locks, it is only opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # no locks here, as on some network file systems
        pass
    return lock


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep the folder of a run to this process.

    Raises:
        RunError: another process trains that run.
    """
    until = time.monotonic() + PATIENCE
    while (lock := locked(folder / LOCK)) is None:
        if time.monotonic() >= until:
            raise RunError(
                f"{folder}: another process is training this run: wait for it, or leave --resume out to begin another"
            )
        time.sleep(POLL)
    _held.add(lock)
    try:
        yield
    finally:
        _let_go(lock)


def _let_go(*locks: int) -> None:
    for lock in _held & set(locks):
        _held.remove(lock)
        os.close(lock)


# A loader's process outlives a run that is killed by some seconds, in which the run could not go on.
os.register_at_fork(after_in_child=lambda: _let_go(*_held))
