"""What a loader's process does when it begins."""

from __future__ import annotations

import os
import signal
import threading

import cv2
import torch


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
