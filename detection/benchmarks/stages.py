"""Where the time and the memory of a training step or of inference go, by stage of the detector."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from detection.anchors import AnchorGenerator
from detection.benchmarks.speed import Mode, Network, contenders, wait
from detection.matching import BalancedSampler, Matcher
from detection.models import roi_heads, rpn
from detection.models.fast import sparse_rpn
from detection.models.fast.packing import PackedHead
from detection.models.pooling import RoIPooler
from detection.models.pyramid import FeaturePyramidNetwork
from detection.models.transform import ImageTransform
from detection.models.trunks import Backbone

# What runs inside another stage counts for itself alone: NMS is no part of the proposals' time.
STAGES: dict[str, list[tuple[Any, str]]] = {
    "transform": [(ImageTransform, "normalise")],
    "backbone": [(Backbone, "forward")],
    "FPN": [(FeaturePyramidNetwork, "forward")],
    "anchors": [(AnchorGenerator, "__call__")],
    "RPN head": [(rpn.RPNHead, "forward"), (sparse_rpn, "head_at")],
    "proposals": [(rpn.RegionProposalNetwork, "propose")],
    "NMS": [(rpn.RegionProposalNetwork, "suppress"), (roi_heads.RoIHeads, "nms_per_class")],
    "assignment": [(Matcher, "__call__"), (BalancedSampler, "__call__"), (roi_heads.RoIHeads, "sample")],
    "RoI pool": [(RoIPooler, "forward")],
    "box head": [(owner, "forward") for owner in (roi_heads.TwoFCHead, PackedHead, roi_heads.FastRCNNPredictor)],
    "losses": [(rpn.RegionProposalNetwork, "losses"), (roi_heads.RoIHeads, "box_losses")],
    "detections": [(roi_heads.RoIHeads, "postprocess")],
    "backward": [(torch.Tensor, "backward")],
    "optimiser": [(torch.optim.SGD, "step")],
}


class Stopwatch:
    """Seconds spent in each stage without the stages inside it, and the most memory in use during it."""

    def __init__(self, device: str) -> None:
        self.peak: dict[str, float] = defaultdict(float)  # MiB
        self._device = device
        self._running: list[str] = []
        self._since: Any = None
        self._spans: list[tuple[str, Any, Any]] = []  # stage, begin and end

    def _turn_to(self, running: list[str]) -> None:
        if self._running:
            stage = self._running[-1]
            self._spans.append((stage, self._since, self._mark()))
            self.peak[stage] = max(self.peak[stage], _peak_since_asked(self._device))
        self._running, self._since = running, self._mark()

    def _mark(self) -> Any:
        """This moment; on a GPU an event, for which the host need not wait."""
        if not self._device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> dict[str, float]:
        """Of each stage, when all is done."""
        wait(self._device)
        found: dict[str, float] = defaultdict(float)
        for stage, begin, end in self._spans:
            found[stage] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
        return found

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block for a stage."""
        self._turn_to([*self._running, name])
        try:
            yield
        finally:
            self._turn_to(self._running[:-1])

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time counted."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def _peak_since_asked(device: str) -> float:
    """MiB that the accelerator, or this process on a CPU, had in use at most since the last call; 0 if unknown."""
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # the kernel starts its high-water mark anew
    except OSError:
        return 0.0
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def measure_stages(
    mode: Mode, network: Network, size: int, batch_size: int, bf16: bool, rounds: int, device: str
) -> list[dict[str, Any]]:
    """Median milliseconds of each stage of our detector in its quick form, its share, and its most memory in MiB.

    Arguments as for `speed.measure_speed`.
    """
    return time_stages(contenders(mode, network, size, batch_size, bf16, device)["ours"], rounds, device)


def time_stages(run: Callable[[], Any], rounds: int, device: str) -> list[dict[str, Any]]:
    """As `measure_stages`, for a step of any detector of ours."""
    run()
    turns = []
    peaks: dict[str, float] = defaultdict(float)
    for _ in range(rounds):
        watch = Stopwatch(device)
        with ExitStack() as stack:
            for name, places in STAGES.items():
                for owner, attribute in places:
                    stack.enter_context(patch.object(owner, attribute, watch.wrap(name, getattr(owner, attribute))))
            with watch.stage("between"):
                run()
        turns.append(watch.seconds)
        peaks |= {name: max(peak, peaks[name]) for name, peak in watch.peak.items()}
    times = {name: 1000 * median(turn[name] for turn in turns) for name in [*STAGES, "between"]}
    whole = sum(times.values())
    rows = [{"stage": name, "ms": ms, "share": ms / whole, "peak_mb": peaks[name]} for name, ms in times.items() if ms]
    return [*rows, {"stage": "all", "ms": whole, "share": 1.0, "peak_mb": max(peaks.values())}]
