"""What a loader's process does when it begins, and the memory that it needs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from detection.data.records import DataError


def init_worker(worker_id: int) -> None:
    """One thread a worker: OpenCV would start one a core in each of them. And signals are left to the parent."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    _leave_signals_to_parent()


def _leave_signals_to_parent() -> None:
    """Clusters and terminals signal all processes of a run; a worker that ended at that would end the run unsaved.

    Only SIGTERM of the parent, which is how it ends a worker, is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True, name="sigterm-of-parent").start()


def check_shared_memory(settings: Mapping[str, Any], min_size: int, folder: str = "/dev/shm") -> None:
    """Warn where the batches that workers keep ready may not fit: a container's 64 MiB end in a bus error.

    Args:
        settings: of the data, as `DetectionDataModule` takes them.
        min_size: the largest short side in pixels.
        folder: where shared memory lies.

    Raises:
        DataError: not one batch fits, or there is no such folder.
    """
    workers, longest = settings["num_workers"], settings["max_size"]
    if not workers or sys.platform != "linux":
        return
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is missing, through which workers send batches: set data.num_workers to 0")
    pixel = settings["channels"] * settings["depth"] // 8
    batch = pixel * min(min_size, longest) * longest * settings["batch_size"]
    # each has two batches ready or in work, and one that it gave away is not free yet
    need, free = 3 * batch * workers >> 20, shutil.disk_usage(folder).free >> 20
    if batch >> 20 > free:
        raise DataError(
            f"{folder} has {free} MiB free, but one batch takes {batch >> 20}: give the container more "
            "(docker run --shm-size=8g), or lower batch_size, or set num_workers to 0"
        )
    if need > free:
        rank_zero_warn(
            f"{folder} has {free} MiB free, but {workers} workers with batches of {batch >> 20} MiB may need {need}: "
            "give the container more (docker run --shm-size=8g) or lower num_workers or batch_size."
        )
