"""Which detections in the frames of a film are of one object: ByteTrack (Zhang et al. 2022), from a library.

Each class has a tracker of its own, so that no id goes from one class to another. A tracker sees weak detections too,
down to a score of `LOWEST`: they may go on with a track, but begin none (the paper's section 3).

Shape shorthand:
    D: detections of a frame
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from detection.inference.detections import Detections

LOWEST = 0.1  # score of the weakest detections that go on with a track, the paper's
FPS = 25.0  # frames a second of a folder of frames, which does not say
MISSING = 'tracking needs trackers: pip install "detection[track]"'


class Tracker(Protocol):
    """What `trackers` has: frame by frame, `supervision.Detections` in, the same with `tracker_id` out."""

    def update(self, detections: Any) -> Any:
        """Those of the detections that it keeps, in any order, each with its id from 0 on, or -1."""


def byte_track(fps: float, score_thresh: float) -> Tracker:
    """ByteTrack as `trackers` has it.

    Args:
        fps: frames a second; a track that nothing goes on with ends after a second.
        score_thresh: from which a detection may begin a track.

    Raises:
        ImportError: the library is not installed.
    """
    try:
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise ImportError(MISSING) from error
    sure = max(score_thresh, LOWEST)
    tracker: Tracker = ByteTrackTracker(frame_rate=fps, track_activation_threshold=sure, high_conf_det_threshold=sure)
    return tracker


class Tracks:
    """Gives the detections of one film, frame by frame in their order, the ids of their objects.

    An id is a number from 1 on, of one object of one class. An object has it from the second frame in which it is seen
    on; before, and where a detection fits no track, there is none.

    Args:
        fps: frames a second; 0 where nobody knows, for `FPS`.
        score_thresh: from which a detection may begin a track.
        make: gives a tracker, of which each class gets one.

    Raises:
        ImportError: the library is not installed.
    """

    def __init__(
        self, fps: float, score_thresh: float = 0.5, make: Callable[[float, float], Tracker] = byte_track
    ) -> None:
        self._make: Callable[[], Tracker] = lambda: make(fps or FPS, score_thresh)
        self._trackers: dict[int, Tracker] = {}
        self._numbers: dict[tuple[int, int], int] = {}  # of each class and its tracker's id
        self._make()  # now, so that what is not installed is said before the film is opened

    def __call__(self, found: Detections) -> Detections:
        """The detections of the next frame, each with its id; give those of low scores too."""
        import supervision

        ids = np.full(len(found), -1, np.int64)
        for label in sorted({*found.labels.tolist(), *self._trackers}):  # of the others, too: their time goes on
            if label not in self._trackers:
                self._trackers[label] = self._make()
            rows = np.flatnonzero((found.labels == label) & (found.scores >= LOWEST))
            seen = self._trackers[label].update(
                supervision.Detections(
                    xyxy=found.boxes[rows].astype(np.float64).reshape(-1, 4),
                    confidence=found.scores[rows].astype(np.float64),
                    class_id=np.full(len(rows), label),
                    data={"row": rows},
                )
            )
            if len(seen):
                for row, own in zip(seen.data["row"].tolist(), seen.tracker_id.tolist(), strict=True):
                    if own >= 0:
                        ids[row] = self._numbers.setdefault((label, own), len(self._numbers) + 1)
        return replace(found, ids=ids)
